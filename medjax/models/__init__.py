"""Backbones (one file a family, each returns a feature pyramid), heads, and the model that joins them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from medjax.errors import UserError

# name in a config -> (file, class)
BACKBONES = {
    "unet": ("unet", "UNet"),
    "nnunet": ("nnunet", "NNUNet"),
    "resenc": ("nnunet", "ResEncUNet"),
    "resnet": ("resnet", "ResNet"),
    "densenet": ("densenet", "DenseNet"),
    "inception": ("inception", "Inception"),
    "mednext": ("mednext", "MedNeXt"),
    "vit": ("vit", "ViT"),
    "unetr": ("vit", "UNETR"),
    "swin": ("swin", "Swin"),
    "swin_unetr": ("swin", "SwinUNETR"),
}


def _class(name: str) -> Any:
    import importlib

    if name not in BACKBONES:
        raise UserError(f"config: model.name '{name}' is not known; known: {', '.join(sorted(BACKBONES))}")
    file, cls = BACKBONES[name]
    return getattr(importlib.import_module(f"medjax.models.{file}"), cls)


def options(name: str) -> dict[str, Any]:
    """The options of a backbone and their defaults (its linen attributes; `dtype` follows train.precision)."""
    skip = {"parent", "name", "dtype"}
    return {f.name: f.default for f in dataclasses.fields(_class(name)) if f.name not in skip}


def build(config: Mapping[str, Any], dtype: Any) -> Any:
    """The backbone of `config.model`, computing in `dtype`."""
    return _class(config["name"])(**{k: v for k, v in config.items() if k != "name"}, dtype=dtype)
