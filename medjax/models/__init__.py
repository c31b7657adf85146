"""Backbones (one file a family, each returns a feature pyramid), heads, and the model that joins them."""

from __future__ import annotations

import dataclasses
import math
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

_TRIPLES = {"kernel", "stem_kernel", "stem_stride", "pool", "window", "patch"}
_RATES = {"dropout", "drop_path"}


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


def check(config: Mapping[str, Any]) -> None:
    """Raises UserError for an option of `config.model` that is not of the type its backbone says, or out of range."""
    name = config["name"]
    for field in dataclasses.fields(_class(name)):
        if field.name in config and (words := _needs(field.name, str(field.type), config[field.name])):
            raise UserError(
                f"config: model.{field.name}={config[field.name]!r}: a network '{name}' needs {words}, such as "
                f"{field.default!r}"
            )


def _needs(key: str, kind: str, value: Any) -> str:
    """What an option of a backbone must be, in words, where `value` is not that; else ''.

    Args:
      kind: its annotation; what stands in none of the backbones here passes.
    """
    numbers = isinstance(value, tuple | list)
    if kind == "bool":
        return "" if isinstance(value, bool) else "True or False"
    if kind == "str":
        return "" if isinstance(value, str) else "a text"
    if kind == "int":
        least = 0 if key == "levels" else 1
        return "" if _whole(value, least) else f"a whole number from {least} on"
    if kind == "float":
        real = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if key in _RATES:
            return "" if real and 0 <= value < 1 else "a number from 0 on, less than 1"
        return "" if real and value > 0 else "a number above 0"
    if kind == "Any" and key != "dtype":
        stages = numbers and len(value) > 0 and all(_whole(v, 1) for v in value)
        return "" if stages or _whole(value, 1) else "a whole number from 1 on, or one for each stage"
    if kind == "Sequence[int]" and key in _TRIPLES:
        return (
            "" if numbers and len(value) == 3 and all(_whole(v, 1) for v in value) else "three whole numbers from 1 on"
        )
    if kind == "Sequence[int]":
        some = numbers and (len(value) > 0 or key != "features") and all(_whole(v, 1) for v in value)
        return "" if some else "a whole number from 1 on for each stage"
    if kind == "Sequence[Any]":
        flat = [w for v in value for w in (v if isinstance(v, tuple | list) else (v,))] if numbers else [0]
        return "" if all(_whole(w, 1) for w in flat) else "three whole numbers from 1 on, or three for each stage"
    return ""


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def build(config: Mapping[str, Any], dtype: Any) -> Any:
    """The backbone of `config.model`, computing in `dtype`; UserError for an option that cannot be (`check`)."""
    check(config)
    return _class(config["name"])(**{k: v for k, v in config.items() if k != "name"}, dtype=dtype)
