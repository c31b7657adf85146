"""`python -m medjax.convert`: weights trained in PyTorch become parameters of a medjax backbone.

    python -m medjax.convert --from=weights.pth --to=runs/pretrained --model=resnet
    python -m medjax.convert --from=checkpoint_final.pth --to=runs/nnunet --model=resenc --task=lesion
    python -m medjax.convert --from=model.safetensors --to=runs/swin --model=swin_unetr --source=monai_legacy

The network's options are read off the weights; --model.KEY=VALUE sets what they do not tell. Only numbers are read: a
file that holds pickled code is refused. What is written, `params.npz`, is read back by `load`; docs/models.md has the
format and what each network expects of its input.
"""

from __future__ import annotations

import argparse
import ast
import collections
import hashlib
import json
import math
import os
import pickle
import pickletools
import re
import struct
import uuid
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medjax.errors import UserError, run_program

FILE = "params.npz"
FORMAT = "medjax parameters 1"
_ABOUT = "about.json"
# Where checkpoints keep the weights, and what wrappers put before every name.
_HOLDERS = ("network_weights", "state_dict", "model_state_dict", "model", "net", "params")
_PREFIXES = ("module.", "_orig_mod.", "net.", "model.", "backbone.", "network.")
_MAGIC = 0x1950A86A20F9469CFC6C  # how files of PyTorch before 1.6 begin

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Rule:
    """Names of PyTorch's modules (a regular expression) -> the module here.

    `way` says how an array is laid out there, where its shape does not: 'up': a transposed convolution whose stride is
    its kernel ([in, out, ...]); 'corners': a 2×2×2 cell's corners in MONAI's order.
    """

    pattern: str
    path: Callable[[re.Match], str]
    way: str = ""


@dataclass(frozen=True)
class Recipe:
    """How a family's weights are read.

    Attributes:
      options: the backbone's, as read off the weights. axes: order of the kernels' spatial axes in the file.
      channels: of the image. rules: the first that matches a name rules it; paths beginning with 'head/' are of the
        task's head. ignored: names that carry nothing: counters, indices, second copies. tokens: learnt positions.
      notes: what was taken for granted, since the weights do not tell it.
    """

    options: dict[str, Any]
    axes: str
    channels: int
    rules: tuple[Rule, ...]
    ignored: str = r"(?!)"
    tokens: int = 0
    notes: tuple[str, ...] = ()


@dataclass
class Matched:
    """What became of the arrays of a file.

    Attributes:
      params: path -> array, of the network. matched: path -> name in the file. reshaped: the same, where more than a
        permutation of axes was needed. missing: paths of the network without an array. unused: names without a path.
      notes: what the reader has to judge: what was taken for granted, and what of the network itself was left over.
    """

    params: Weights = field(default_factory=dict)
    matched: dict[str, str] = field(default_factory=dict)
    reshaped: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# --- files -----------------------------------------------------------------------------------------------------------


def read(file: Path) -> Weights:
    """Names and arrays of a `.safetensors` file or of a PyTorch checkpoint (weights only; needs torch)."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if file.suffix == ".safetensors":
        return _strip(_read_safetensors(file))
    try:
        import torch
    except ImportError:
        raise UserError(
            f"{file}: reading PyTorch's files needs torch (pip install torch, the CPU build is enough); "
            ".safetensors files need nothing"
        ) from None
    # What nnU-Net's checkpoints hold besides weights: numbers of its log, as NumPy scalars. Constructors of plain data.
    scalar = type(np.float64(0)).__reduce__(np.float64(0))[0]
    plain: list[Any] = [(scalar, "numpy.core.multiarray.scalar"), scalar]
    plain += [np.dtype, *(type(np.dtype(t)) for t in ("f2", "f4", "f8", "i4", "i8", "?"))]
    try:
        with torch.serialization.safe_globals(plain):
            found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if _garbled(file):
            raise UserError(f"{file}: is no PyTorch checkpoint, or damaged: download it again") from error
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise UserError(
            f"{file}: holds pickled objects besides weights{what} and is not opened, since such files can run code. "
            "Where you trust it, write its weights alone: torch.save(model.state_dict(), 'weights.pth')"
        ) from error
    except (RuntimeError, EOFError, OSError, LookupError, struct.error, ValueError, TypeError, AttributeError) as error:
        why = f" ({' '.join(str(error).split())[:150]})" if str(error) else ""
        raise UserError(f"{file}: is no PyTorch checkpoint, or damaged: download it again{why}") from error
    tensors = {k: v for k, v in _state(found, file).items() if isinstance(v, torch.Tensor)}
    plainly = {k: v.detach() for k, v in tensors.items()}  # those of named_parameters() hang on gradients
    return _strip({k: v.float().numpy() if v.is_floating_point() else v.numpy() for k, v in plainly.items()})


def _garbled(file: Path) -> bool:
    """Whether a file is neither an archive nor whole pickles, as old versions of PyTorch wrote; runs none of them."""
    with file.open("rb") as stream:
        head = stream.read(4)
        stream.seek(0)
        if head == b"PK\x03\x04":
            return False
        if not head.startswith(b"\x80"):  # a page saved by a browser, say
            return True
        try:
            # A magic number, the protocol, the machine, the names; what begins otherwise is one pickle.
            first = [value for _, value, _ in pickletools.genops(stream)]
            for _ in range(3 if _MAGIC in first else 0):
                collections.deque(pickletools.genops(stream), 0)
        except (ValueError, EOFError, OverflowError, MemoryError, struct.error):
            return True
    return False


def _state(found: Any, file: Path) -> Mapping[str, Any]:
    """The table of tensors in what a checkpoint holds."""
    places = [found, *(found[k] for k in _HOLDERS if k in found)] if isinstance(found, Mapping) else []
    for place in reversed(places):
        if isinstance(place, Mapping) and any(
            isinstance(k, str) and "." in k and hasattr(v, "shape") for k, v in place.items()
        ):
            return place
    raise UserError(f"{file}: no table of weights in it; looked for one at the top and in {', '.join(_HOLDERS)}")


_SAFE = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
         "U8": "u1", "BOOL": "?"}  # fmt: skip


def _read_safetensors(file: Path) -> Weights:
    """The format: the header's length (8 bytes), the header (JSON: name -> dtype, shape, offsets), the bytes."""
    raw = file.read_bytes()
    try:
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        if not isinstance(header, dict):
            raise TypeError("its header is no table of names")
        body = memoryview(raw)[8 + length :]
        found = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = entry["data_offsets"]
            array = np.frombuffer(body[begin:end], _SAFE[entry["dtype"]]).reshape(entry["shape"])
            if entry["dtype"] == "BF16":  # the upper half of a float32
                array = (array.astype(np.uint32) << 16).view(np.float32)
            found[name] = array.astype(np.float32) if array.dtype.kind == "f" else array
        return found
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: is no .safetensors file, or damaged: download it again ({error})") from error


def _strip(weights: Weights) -> Weights:
    """Without what wrappers put before every name."""
    while weights:
        prefix = next((p for p in _PREFIXES if all(k.startswith(p) for k in weights)), None)
        if prefix is None:
            break
        weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    return weights


def save(folder: Path, params: Weights, about: Mapping[str, Any]) -> Path:
    """Writes `params` (path -> array) and what they are of into `folder`, beside and renamed."""
    file = folder / FILE
    beside = folder / f".{FILE}.{uuid.uuid4().hex}.tmp"  # processes of one number may write from several machines
    text = json.dumps({"format": FORMAT, **about}, indent=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as stream:
            np.savez(stream, **{_ABOUT: np.frombuffer(text.encode(), np.uint8)}, **params)  # type: ignore[arg-type]
        os.replace(beside, file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{file}: cannot write: {error.strerror}; free some room or choose another folder") from error
    return file


def load(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `save` wrote: the parameters as a tree, as far as the file had them, and what they are of.

    'about' has `model` (name and options), `axes`, `task` and its `classes` where a head came along, and the source.
    """
    file = folder / FILE if folder.is_dir() else folder
    try:
        with np.load(file, allow_pickle=False) as stored:
            about = json.loads(stored[_ABOUT].tobytes())
            flat = {k: stored[k] for k in stored.files if k != _ABOUT}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: is no file of python -m medjax.convert, or damaged ({error})") from error
    if about.get("format") != FORMAT:
        raise UserError(f"{file}: has the format {about.get('format')!r}; this version reads {FORMAT!r}")
    tree: dict[str, Any] = {}
    for path, array in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[leaf] = array
    return tree, about


# --- families --------------------------------------------------------------------------------------------------------


def _numbers(weights: Weights, pattern: str) -> list[tuple[int, ...]]:
    """The numbers in the names that match, each once, in order."""
    found = {tuple(map(int, m.groups())) for k in weights if (m := re.match(pattern, k))}
    return sorted(found)


def _count(weights: Weights, pattern: str) -> int:
    return len(_numbers(weights, pattern))


def _need(weights: Weights, name: str, model: str) -> np.ndarray:
    if name not in weights:
        some = ", ".join(list(weights)[:4])
        raise UserError(f"convert: these are no weights of a {model}: no '{name}' among them (they begin: {some})")
    return weights[name]


def _first(weights: Weights, pattern: str, model: str) -> np.ndarray:
    """The first matrix or kernel whose whole name matches."""
    found = next((v for k, v in weights.items() if re.fullmatch(pattern, k) and v.ndim >= 2), None)
    if found is None:
        raise UserError(f"convert: these are no weights of a {model}, or not all: none is called '{pattern}'")
    return found


def _kernel(weights: Weights, name: str, model: str) -> np.ndarray:
    """The kernel of a 3D convolution, [out, in, ...] or [in, out, ...]."""
    found = _need(weights, name, model)
    if found.ndim != 5:
        kind = f"a {found.ndim - 2}D" if found.ndim in (3, 4) else "no"
        raise UserError(
            f"convert: '{name}' of shape {found.shape} is the kernel of {kind} convolution, and networks here are 3D; "
            "weights trained in 3D have five axes there"
        )
    return found


def _space(weight: np.ndarray, axes: str) -> tuple[int, ...]:
    """A kernel's size along (x, y, z)."""
    size = weight.shape[2:]
    return size[::-1] if axes == "zyx" else size


def _nnunet(weights: Weights, source: str, axes: str, given: Mapping[str, Any]) -> Recipe:
    axes = axes or "zyx"
    residual = "encoder.stem.convs.0.conv.weight" in weights
    if residual:
        place = "encoder.stages.{}.blocks.0.conv1.conv"
        blocks = r"encoder\.stages\.{}\.blocks\.(\d+)\.conv1\.conv\.weight"
    else:
        place = "encoder.stages.{}.0.convs.0.conv"
        blocks = r"encoder\.stages\.{}\.0\.convs\.(\d+)\.conv\.weight"
    _kernel(weights, place.format(0) + ".weight", "nnU-Net (dynamic_network_architectures)")
    n = _count(weights, r"encoder\.stages\.(\d+)\.")
    firsts = [_kernel(weights, place.format(i) + ".weight", "nnU-Net") for i in range(n)]
    ups = [_kernel(weights, f"decoder.transpconvs.{n - 2 - i}.weight", "nnU-Net") for i in range(n - 1)]
    convs = [_count(weights, rf"decoder\.stages\.{n - 2 - i}\.convs\.(\d+)\.conv\.weight") for i in range(n - 1)]
    options = {
        "features": tuple(w.shape[0] for w in firsts),
        "kernels": tuple(_space(w, axes) for w in firsts),
        "factors": tuple(_space(w, axes) for w in ups),
        "blocks": tuple(_count(weights, blocks.format(i)) for i in range(n)),
        "decoder_convs": tuple(convs),
        "residual": residual,
        "use_bias": place.format(0) + ".bias" in weights,
    }

    def level(m: re.Match) -> int:  # the decoder counts from the coarsest
        return n - 2 - int(m[1])

    rules = (
        Rule(r"encoder\.stem\.convs\.0\.(conv|norm)", lambda m: f"stem/{m[1]}"),
        Rule(r"encoder\.stages\.(\d+)\.0\.convs\.(\d+)\.(conv|norm)", lambda m: f"encoder{m[1]}/block{m[2]}/{m[3]}"),
        Rule(
            r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.(conv1|conv2)\.(conv|norm)",
            lambda m: f"encoder{m[1]}/block{m[2]}_{m[3]}/{m[4]}",
        ),
        Rule(
            r"encoder\.stages\.(\d+)\.blocks\.(\d+)\.skip\.\d+\.(conv|norm)",
            lambda m: f"encoder{m[1]}/block{m[2]}_skip/{m[3]}",
        ),
        Rule(r"decoder\.transpconvs\.(\d+)", lambda m: f"decoder/up{level(m)}", "up"),
        Rule(
            r"decoder\.stages\.(\d+)\.convs\.(\d+)\.(conv|norm)",
            lambda m: f"decoder/stage{level(m)}/block{m[2]}/{m[3]}",
        ),
        Rule(r"decoder\.seg_layers\.(\d+)", lambda m: f"head/level{level(m)}"),
    )
    stem = weights.get("encoder.stem.convs.0.conv.weight", firsts[0])
    return Recipe(options, axes, stem.shape[1], rules, r"decoder\.encoder\.|.*\.all_modules\.")


def _resnet(weights: Weights, source: str, axes: str, given: Mapping[str, Any]) -> Recipe:
    from medjax.models.resnet import DEPTHS

    stem = _kernel(weights, "conv1.weight", "ResNet")
    _need(weights, "layer1.0.conv1.weight", "ResNet")
    blocks = tuple(_count(weights, rf"layer{i + 1}\.(\d+)\.conv1\.weight") for i in range(4))
    wide = "layer1.0.conv3.weight" in weights
    depth = next((d for d, kind in DEPTHS.items() if kind == (blocks, wide)), None)
    if depth is None:
        raise UserError(
            f"convert: layers of {blocks} blocks are no ResNet of known depth ({', '.join(map(str, DEPTHS))})"
        )
    options: dict[str, Any] = {
        "depth": depth,
        "features": tuple(_kernel(weights, f"layer{i + 1}.0.conv1.weight", "ResNet").shape[0] for i in range(4)),
        "stem_kernel": tuple(stem.shape[2:]),
        "shortcut": "B" if any(".downsample.0.weight" in k for k in weights) else "A",
        "shortcut_bias": any(".downsample.0.bias" in k for k in weights),
        "norm": "batch_frozen",
    }
    if source == "medicalnet":
        options |= {"stem_stride": (2, 2, 2), "factors": ((1, 1, 1), (2, 2, 2), (1, 1, 1), (1, 1, 1))}
        options |= {"dilations": (1, 1, 2, 4)}

    def block(m: re.Match) -> str:
        return f"layer{int(m[1]) - 1}_block{m[2]}"

    kinds = {"0": "conv", "1": "norm"}
    rules = (
        Rule(r"conv1", lambda m: "stem/conv"),
        Rule(r"bn1", lambda m: "stem/norm"),
        Rule(r"layer(\d)\.(\d+)\.conv(\d)", lambda m: f"{block(m)}/conv{m[3]}/conv"),
        Rule(r"layer(\d)\.(\d+)\.bn(\d)", lambda m: f"{block(m)}/conv{m[3]}/norm"),
        Rule(r"layer(\d)\.(\d+)\.downsample\.([01])", lambda m: f"{block(m)}/shortcut/{kinds[m[3]]}"),
    )
    return Recipe(options, axes or "xyz", stem.shape[1], rules, r".*\.num_batches_tracked")


def _densenet(weights: Weights, source: str, axes: str, given: Mapping[str, Any]) -> Recipe:
    stem = _kernel(weights, "features.conv0.weight", "DenseNet")
    n = _count(weights, r"features\.denseblock(\d+)\.")
    layer = r"features\.denseblock{}\.denselayer(\d+)\.(?:layers\.)?conv1\.weight"
    second = _first(weights, r"features\.denseblock1\.denselayer1\.(layers\.)?conv2\.weight", "DenseNet")
    options = {
        "blocks": tuple(_count(weights, layer.format(i + 1)) for i in range(n)),
        "features": stem.shape[0],
        "growth": second.shape[0],
        "width": second.shape[1] // second.shape[0],
        "stem_kernel": tuple(stem.shape[2:]),
        "norm": "batch_frozen",
    }
    rules = (
        Rule(r"features\.(conv|norm)0", lambda m: f"stem/{m[1]}"),
        Rule(
            r"features\.denseblock(\d+)\.denselayer(\d+)\.(?:layers\.)?(conv1|conv2|norm1|norm2)",
            lambda m: f"block{int(m[1]) - 1}_layer{int(m[2]) - 1}/{m[3]}",
        ),
        Rule(r"features\.transition(\d+)\.norm", lambda m: f"block{int(m[1]) - 1}_norm"),
        Rule(r"features\.transition(\d+)\.conv", lambda m: f"transition{int(m[1]) - 1}"),
        Rule(rf"features\.norm{n + 1}", lambda m: f"block{n - 1}_norm"),
    )
    return Recipe(options, axes or "xyz", stem.shape[1], rules, r".*\.num_batches_tracked")


def _mednext(weights: Weights, source: str, axes: str, given: Mapping[str, Any]) -> Recipe:
    stem = _kernel(weights, "stem.weight", "MedNeXt")
    monai = "enc_stages.0.0.conv1.weight" in weights
    axes = axes or ("xyz" if monai else "zyx")
    stage, down = ("enc_stages.{}", "down_blocks.{}") if monai else ("enc_block_{}", "down_{}")
    n = _count(weights, re.escape(stage).replace(r"\{\}", r"(\d+)") + r"\.") + 1
    names = [*(stage.format(i) for i in range(n - 1)), "bottleneck"]
    expands = [_need(weights, f"{name}.0.conv2.weight", "MedNeXt") for name in names]
    downs = [_need(weights, f"{down.format(i)}.conv2.weight", "MedNeXt") for i in range(n - 1)]
    options = {
        "features": stem.shape[0],
        "blocks": tuple(_count(weights, re.escape(name) + r"\.(\d+)\.conv1\.weight") for name in names),
        "expansions": tuple(w.shape[0] // w.shape[1] for w in expands),
        "down_expansions": tuple(w.shape[0] // w.shape[1] for w in downs),
        "kernel": _space(_kernel(weights, f"{names[0]}.0.conv1.weight", "MedNeXt"), axes),
    }
    parts = {"conv1": "depthwise", "norm": "norm", "conv2": "expand", "conv3": "compress", "res_conv": "shortcut"}
    part = r"(conv1|norm|conv2|conv3|res_conv)"

    def level(text: str) -> int:  # MONAI's decoder counts from the coarsest
        return n - 2 - int(text) if monai else int(text)

    rules = (
        Rule(r"stem", lambda m: "stem"),
        Rule(r"(?:enc_stages\.|enc_block_)(\d+)\.(\d+)\." + part, lambda m: f"encoder{m[1]}_block{m[2]}/{parts[m[3]]}"),
        Rule(r"(?:down_blocks\.|down_)(\d+)\." + part, lambda m: f"down{m[1]}/{parts[m[2]]}"),
        Rule(r"bottleneck\.(\d+)\." + part, lambda m: f"encoder{n - 1}_block{m[1]}/{parts[m[2]]}"),
        Rule(r"(?:up_blocks\.|up_)(\d+)\." + part, lambda m: f"up{level(m[1])}/{parts[m[2]]}"),
        Rule(
            r"(?:dec_stages\.|dec_block_)(\d+)\.(\d+)\." + part,
            lambda m: f"decoder{level(m[1])}_block{m[2]}/{parts[m[3]]}",
        ),
        Rule(r"out_(\d+)\.conv_out", lambda m: f"head/level{m[1]}", "up"),
    )
    return Recipe(options, axes, stem.shape[1], rules, r"dummy_tensor")


def _unetr_parts(module: str) -> str:
    """UNETR's residual block: their names of its layers -> ours."""
    return {"conv1": "conv1/conv", "conv2": "conv2/conv", "conv3": "shortcut/conv"}[module]


def _swin(weights: Weights, source: str, axes: str, given: Mapping[str, Any]) -> Recipe:
    weights = {k.removeprefix("swinViT."): v for k, v in weights.items()}
    embed = _kernel(weights, "patch_embed.proj.weight", "Swin transformer")
    if any(re.match(r"layers\d+c\.", k) for k in weights):
        raise UserError(
            "convert: these are weights of SwinUNETR(use_v2=True), with a residual convolution before every stage "
            "(layers1c to layers4c); the Swin transformer here has none, and would be another network without them"
        )
    _need(weights, "layers1.0.blocks.0.attn.relative_position_bias_table", "Swin transformer")
    n = _count(weights, r"layers(\d)\.0\.blocks\.")
    tables = [_need(weights, f"layers{i + 1}.0.blocks.0.attn.relative_position_bias_table", "Swin") for i in range(n)]
    side = round(len(tables[0]) ** (1 / 3))
    first = _first(weights, r"layers1\.0\.blocks\.0\.mlp\.(linear1|fc1)\.weight", "Swin transformer")
    options = {
        "features": embed.shape[0],
        "patch": tuple(embed.shape[2:]),
        "depths": tuple(_count(weights, rf"layers{i + 1}\.0\.blocks\.(\d+)\.norm1\.weight") for i in range(n)),
        "heads": tuple(t.shape[1] for t in tables),
        "window": ((side + 1) // 2,) * 3,
        "mlp_ratio": first.shape[0] // first.shape[1],
        "qkv_bias": "layers1.0.blocks.0.attn.qkv.bias" in weights,
        "reference_bias": True,
        "merging": "legacy" if source == "monai_legacy" else "cells",
    }
    block = r"(?:swinViT\.)?layers(\d)\.0\.blocks\.(\d+)\."
    merging = "corners" if source in ("", "monai") else ""
    inner = {"fc1": "linear1", "fc2": "linear2"}
    # MONAI counts the encoder's refined levels from 1 (the image) and the coarsest as 10; its decoder from 1 as well.
    skips = {"1": "image", **{str(i + 2): f"skip{i}" for i in range(n - 1)}, "10": f"skip{n}"}

    def at(m: re.Match) -> str:
        return f"stage{int(m[1]) - 1}_block{m[2]}"

    rules = (
        Rule(r"(?:swinViT\.)?patch_embed\.proj", lambda m: "embed"),
        Rule(block + r"(norm1|norm2)", lambda m: f"{at(m)}/{m[3]}"),
        Rule(block + r"attn\.(qkv|proj)", lambda m: f"{at(m)}/{m[3]}"),
        Rule(block + r"attn\.relative_position_bias_table", lambda m: f"{at(m)}/bias_table"),
        Rule(block + r"mlp\.(\w+)", lambda m: f"{at(m)}/mlp/{inner.get(m[3], m[3])}"),
        Rule(r"(?:swinViT\.)?layers(\d)\.0\.downsample\.reduction", lambda m: f"merge{int(m[1]) - 1}/reduce", merging),
        Rule(r"(?:swinViT\.)?layers(\d)\.0\.downsample\.norm", lambda m: f"merge{int(m[1]) - 1}/norm", merging),
        Rule(r"encoder(\d+)\.layer\.(conv\d)\.conv", lambda m: f"{skips[m[1]]}/{_unetr_parts(m[2])}"),
        Rule(r"decoder(\d)\.transp_conv\.conv", lambda m: f"decoder{int(m[1]) - 1}/up", "up"),
        Rule(
            r"decoder(\d)\.conv_block\.(conv\d)\.conv",
            lambda m: f"decoder{int(m[1]) - 1}/block/{_unetr_parts(m[2])}",
        ),
        Rule(r"out\.conv\.conv", lambda m: "head/level0"),
    )
    return Recipe(options, axes or "xyz", embed.shape[1], rules, r".*relative_position_index")


def _vit(weights: Weights, source: str, axes: str, given: Mapping[str, Any]) -> Recipe:
    plain = {k.removeprefix("vit."): v for k, v in weights.items()}
    position = _need(plain, "patch_embedding.position_embeddings", "ViT of MONAI")
    features = position.shape[-1]
    options: dict[str, Any] = {
        "features": features,
        "depth": _count(plain, r"blocks\.(\d+)\.norm1\.weight"),
        "heads": max(features // 64, 1),
        "mlp": _need(plain, "blocks.0.mlp.linear1.weight", "ViT of MONAI").shape[0],
        "qkv_bias": "blocks.0.attn.qkv.bias" in plain,
    }
    notes = []
    if "heads" not in given:
        notes.append(
            f"the file does not tell the number of attention heads: taken as {options['heads']} ({features} features); "
            "--model.heads=N sets it. Any number fits the shapes, another one than was trained computes something else"
        )
    if "patch_embedding.patch_embeddings.weight" in plain:
        embed = _kernel(plain, "patch_embedding.patch_embeddings.weight", "ViT of MONAI")
        options["patch"], channels = tuple(embed.shape[2:]), embed.shape[1]
    else:  # a linear map of flattened cells, whose size it does not tell
        options["patch"] = tuple(given.get("patch", (16, 16, 16)))
        linear = _need(plain, "patch_embedding.patch_embeddings.1.weight", "ViT of MONAI")
        cell = "×".join(map(str, options["patch"]))
        channels, rest = divmod(linear.shape[-1], max(math.prod(options["patch"]), 1))
        if rest or not channels:
            raise UserError(
                f"convert: a token of this ViT is made of {linear.shape[-1]} values, no multiple of {cell} voxels; "
                "give the voxels of a token with --model.patch=(X,Y,Z)"
            )
        if "patch" not in given:
            notes.append(
                f"the file does not tell the voxels of a token: taken as {cell} of {channels} channel(s); "
                "--model.patch=(X,Y,Z) sets them"
            )
    if (image := weights.get("encoder1.layer.conv1.conv.weight")) is not None:
        options["decoder_features"] = image.shape[0]
    block = r"(?:vit\.)?blocks\.(\d+)\."
    modules = {"qkv": "qkv", "out_proj": "proj"}

    def skip(m: re.Match) -> str:
        return f"skip{int(m[1]) - 1}"

    rules = (
        Rule(r"(?:vit\.)?patch_embedding\.patch_embeddings(?:\.1)?", lambda m: "encoder/embed"),
        Rule(r"(?:vit\.)?patch_embedding\.position_embeddings", lambda m: "encoder/position"),
        Rule(block + r"(norm1|norm2)", lambda m: f"encoder/block{m[1]}/{m[2]}"),
        Rule(block + r"attn\.(qkv|out_proj)", lambda m: f"encoder/block{m[1]}/{modules[m[2]]}"),
        Rule(block + r"mlp\.(linear1|linear2)", lambda m: f"encoder/block{m[1]}/mlp/{m[2]}"),
        Rule(r"(?:vit\.)?norm", lambda m: "encoder/norm"),
        Rule(r"encoder1\.layer\.(conv\d)\.conv", lambda m: f"image/{_unetr_parts(m[1])}"),
        Rule(r"encoder(\d)\.transp_conv_init\.conv", lambda m: f"{skip(m)}_up3", "up"),
        Rule(r"encoder(\d)\.blocks\.(\d)\.0\.conv", lambda m: f"{skip(m)}_up{2 - int(m[2])}", "up"),
        Rule(
            r"encoder(\d)\.blocks\.(\d)\.1\.(conv\d)\.conv",
            lambda m: f"{skip(m)}_block{2 - int(m[2])}/{_unetr_parts(m[3])}",
        ),
        Rule(r"decoder(\d)\.transp_conv\.conv", lambda m: f"decoder{int(m[1]) - 2}/up", "up"),
        Rule(
            r"decoder(\d)\.conv_block\.(conv\d)\.conv",
            lambda m: f"decoder{int(m[1]) - 2}/block/{_unetr_parts(m[2])}",
        ),
        Rule(r"out\.conv\.conv", lambda m: "head/level0"),
    )
    ignored = r".*\b(norm_cross_attn|cross_attn)\."
    return Recipe(options, axes or "xyz", channels, rules, ignored, position.shape[1], tuple(notes))


# model -> (how its weights are read, the sources it tells apart; the first is the default)
FAMILIES: dict[str, tuple[Callable[[Weights, str, str, Mapping[str, Any]], Recipe], tuple[str, ...]]] = {
    "nnunet": (_nnunet, ("nnunet",)),
    "resenc": (_nnunet, ("nnunet",)),
    "resnet": (_resnet, ("monai", "medicalnet")),
    "densenet": (_densenet, ("monai",)),
    "mednext": (_mednext, ("mednext", "monai")),
    "vit": (_vit, ("monai",)),
    "unetr": (_vit, ("monai",)),
    "swin": (_swin, ("monai", "monai_v2", "monai_legacy")),
    "swin_unetr": (_swin, ("monai", "monai_v2", "monai_legacy")),
}

# --- matching --------------------------------------------------------------------------------------------------------

# MONAI's order of a cell's corners, as places in ours (z fastest).
_CORNERS = [4 * i + 2 * j + k for i, j, k in
            ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))]  # fmt: skip
_LEAVES = {"weight": ("kernel", "scale"), "bias": ("bias",), "running_mean": ("mean",), "running_var": ("variance",)}


def match(weights: Weights, shapes: Mapping[str, tuple[int, ...]], recipe: Recipe, head: str = "") -> Matched:
    """Lays the arrays of a file out as the parameters of a network.

    Args:
      shapes: path -> shape of every parameter. head: module that takes the head's weights; '': they stay unused.

    Raises UserError where an array does not fit its place, or none found one.
    """
    done = Matched()
    for name, array in weights.items():
        if re.match(recipe.ignored, name):
            continue
        path, way = _place(name, shapes, recipe.rules, head)
        if path is None:
            done.unused.append(name)
            continue
        laid, reshaped = _lay_out(array, shapes[path], way, recipe.axes)
        if laid is None:
            raise UserError(
                f"convert: '{name}' of shape {array.shape} does not fit '{path}' of shape {shapes[path]}; set the "
                "option of the network that differs with --model.KEY=VALUE"
            )
        done.params[path] = np.ascontiguousarray(laid, np.float32)
        (done.reshaped if reshaped else done.matched)[path] = name
    done.notes += recipe.notes
    done.missing = [path for path in shapes if path not in done.params]
    if not done.params:
        some = ", ".join(list(weights)[:4])
        raise UserError(f"convert: not one of the {len(weights)} arrays belongs to this network (they begin: {some})")
    return done


def _place(name: str, shapes: Mapping[str, Any], rules: Iterable[Rule], head: str) -> tuple[str | None, str]:
    """The path an array of the file goes to, if any, and its rule's way."""
    for rule in rules:
        found = re.match(rule.pattern + r"(?:\.(\w+))?$", name)
        if found is None:
            continue
        stem = rule.path(found)
        stem = f"{head}/{stem.removeprefix('head/')}" if stem.startswith("head/") else f"backbone/{stem}"
        leaf = found[found.re.groups]
        paths = [f"{stem}/{other}" for other in _LEAVES.get(leaf, ())] if leaf else [stem]
        return next((p for p in paths if p in shapes), None), rule.way
    return None, ""


def _lay_out(array: np.ndarray, shape: tuple[int, ...], way: str, axes: str) -> tuple[np.ndarray | None, bool]:
    """The array in our layout, or None where it does not fit; and whether it took more than a permutation of axes."""
    space = (4, 3, 2) if axes == "zyx" else (2, 3, 4)
    reshaped = False
    if way == "corners" and array.ndim and array.shape[-1] % 8 == 0:  # the last axis is 8 corners of C channels each
        parts = array.reshape(*array.shape[:-1], 8, -1)
        array = np.empty_like(parts)
        array[..., _CORNERS, :] = parts
        array, reshaped = array.reshape(*array.shape[:-2], -1), True
    if array.ndim == 5 and len(shape) == 5:
        array = array.transpose(*space, *((0, 1) if way == "up" else (1, 0)))
    elif array.ndim == 2 and len(shape) == 2:
        array = array.T
    elif array.ndim == 2 and len(shape) == 5 and array.size == math.prod(shape):  # cells flattened, channels fastest
        array, reshaped = array.reshape(shape[4], *shape[:4]).transpose(1, 2, 3, 4, 0), True
    elif array.ndim in (2, 3) and len(shape) == 4 and array.size == math.prod(shape):  # a grid flattened, z fastest
        array, reshaped = array.reshape(shape), True
    return (array if array.shape == shape else None), reshaped


def convert(
    weights: Weights,
    model: str,
    *,
    source: str = "",
    axes: str = "",
    options: Mapping[str, Any] | None = None,
    task: str = "",
    image: Sequence[int] = (),
) -> tuple[Matched, dict[str, Any]]:
    """Weights by their names in PyTorch -> parameters, and what they are of (`about`, see `load`).

    Args:
      model: one of `FAMILIES`. source: whose weights, where that matters. axes: 'xyz' or 'zyx', the order of the
        kernels' spatial axes in the file; '': as the source has it. options: of the backbone, over those read off the
        weights. task: takes the segmentation head. image: size a ViT's positions were learnt at; (): a cube.
    """
    import jax
    import jax.numpy as jnp

    from medjax import config, models
    from medjax.models.heads import DenseHead
    from medjax.models.model import Model

    if model not in FAMILIES:
        raise UserError(f"convert: --model '{model}' has no converter; known: {', '.join(FAMILIES)}")
    family, sources = FAMILIES[model]
    if source and source not in sources:
        raise UserError(f"convert: --source '{source}' is not known for {model}; known: {', '.join(sources)}")
    if axes not in ("", "xyz", "zyx"):
        raise UserError(f"convert: --axes '{axes}' is neither xyz nor zyx")
    if axes == "zyx" and family in (_swin, _vit):
        raise UserError(f"convert: --axes=zyx is for convolutional networks; {model} is read as xyz only")
    known = models.options(model)
    for key in options or {}:
        if key not in known:
            raise config.unknown_key(key, known, "model")
    models.check({"name": model, **(options or {})})
    recipe = family(weights, source, axes, options or {})
    chosen = {"name": model, **recipe.options, **(options or {})}
    backbone = models.build(chosen, jnp.float32)
    heads = {}
    if task:
        found = _head(weights, recipe)
        if not found:
            raise UserError("convert: --task was given, but the file has no segmentation head for this network")
        heads = {task: DenseHead(found[min(found)], levels=1 + max(found))}
    size = tuple(image) or backbone.total_factor()
    if recipe.tokens and not image:
        side = round(recipe.tokens ** (1 / 3))
        if side**3 != recipe.tokens:
            raise UserError(f"convert: {recipe.tokens} positions are no cube; give the image's size with --image=X,Y,Z")
        size = tuple(side * p for p in backbone.patch)
    like = jax.ShapeDtypeStruct((1, *size, recipe.channels), jnp.float32)
    tree = jax.eval_shape(lambda x: Model(backbone, heads).init(jax.random.key(0), x, train=True), like)["params"]
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in flat}
    done = match(weights, shapes, recipe, f"heads_{task}")
    alone = ("encoder", "decoder") if model in ("vit", "swin") else ()
    inner = [n for n in done.unused if not re.match(_HEADS, n) and not n.startswith(alone)]
    if inner:
        more = f" and {len(inner) - 4} more" if len(inner) > 4 else ""
        done.notes.append(
            f"{len(inner)} unused array(s) are of no head that is known, but of the network itself: "
            f"{', '.join(inner[:4])}{more}. The network here has no place for them and COMPUTES SOMETHING ELSE than "
            "the one they were trained in, unless they took no part there"
        )
    about: dict[str, Any] = {"model": chosen, "axes": recipe.axes, "channels": recipe.channels}
    if task:
        about |= {"task": task, "classes": heads[task].outputs}
    return done, about


# Modules that come after the features: what is left of them says nothing of the backbone.
_HEADS = r"(?:fc|out|out_\d+|class_layers|classifier|conv_seg|decoder\.seg_layers|\w*_head)\."


def _head(weights: Weights, recipe: Recipe) -> dict[int, int]:
    """Level -> outputs of the segmentation heads in a file."""
    found = {}
    for name, array in weights.items():
        for rule in recipe.rules:
            if m := re.match(rule.pattern + r"\.weight$", name):
                if level := re.match(r"head/level(\d+)$", rule.path(m)):
                    found[int(level[1])] = array.shape[1 if rule.way == "up" else 0]
                break
    return found


# --- the command -----------------------------------------------------------------------------------------------------


def table(done: Matched) -> str:
    """What became of the arrays, a line a module, and the totals."""
    rows: dict[str, list[str]] = {}
    for path, name in {**done.matched, **done.reshaped}.items():
        module = path.rsplit("/", 1)[0]
        rows.setdefault(module, []).append(name)
    lines = []
    width = max(map(len, rows), default=0)
    for module, names in rows.items():
        mark = "reshaped" if any(n in done.reshaped.values() for n in names) else "matched "
        parents = sorted({n.rpartition(".")[0] for n in names})
        lines.append(f"{mark}  {module:<{width}}  {', '.join(parents)} ({len(names)})")
    lines += [f"missing   {path}" for path in done.missing]
    lines += [f"unused    {name}" for name in done.unused]
    counts = {"matched": done.matched, "reshaped": done.reshaped, "missing": done.missing, "unused": done.unused}
    notes = [f"NOTE      {note}" for note in done.notes]
    return "\n".join([*lines, ", ".join(f"{len(v)} {k}" for k, v in counts.items()), *notes])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m medjax.convert", description=__doc__, formatter_class=argparse.RawTextHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    p.add_argument("--from", dest="file", required=True, type=Path, help="PyTorch checkpoint or .safetensors file")
    p.add_argument("--to", dest="folder", required=True, type=Path, help=f"folder that gets {FILE}")
    p.add_argument("--model", required=True, choices=FAMILIES, help="backbone the weights are for")
    sources = "; ".join(f"{name}: {', '.join(s)}" for name, (_, s) in FAMILIES.items() if len(s) > 1)
    p.add_argument("--source", default="", help=f"whose weights ({sources})")
    p.add_argument("--axes", default="", help="order of the kernels' spatial axes in the file: xyz or zyx")
    p.add_argument("--task", default="", help="task that gets the file's segmentation head")
    p.add_argument("--image", default="", help="X,Y,Z a ViT's positions were learnt at, where not a cube")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Converts one file; raises UserError for a user's mistake."""
    args, rest = parser().parse_known_args(argv)
    options = {}
    for text in rest:
        key, equals, value = text.partition("=")
        if not key.startswith("--model.") or not equals:
            raise UserError(f"unknown argument '{text}'; see --help")
        try:
            options[key.removeprefix("--model.")] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key.removeprefix("--model.")] = value
    try:
        image = tuple(int(n) for n in args.image.split(",")) if args.image else ()
    except ValueError:
        raise UserError(f"--image={args.image}: expected three whole numbers, such as 96,96,96") from None
    if len(image) not in (0, 3):
        raise UserError(f"--image={args.image}: expected three whole numbers, such as 96,96,96")
    weights = read(args.file)
    done, about = convert(
        weights, args.model, source=args.source, axes=args.axes, options=options, task=args.task, image=image
    )
    digest = hashlib.sha256(args.file.read_bytes()).hexdigest()
    about["source"] = {"file": args.file.name, "sha256": digest, "of": args.source or FAMILIES[args.model][1][0]}
    print(table(done))
    print(f"written to {save(args.folder, done.params, about)}")


if __name__ == "__main__":
    run_program(main)
