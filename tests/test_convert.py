"""Converters: files, layouts, the command; and the same weights giving the same output as in PyTorch (peers)."""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medjax import config as config_lib
from medjax import convert, models, transfer
from medjax.errors import UserError
from medjax.models.heads import DenseHead
from medjax.models.model import Model

TOLERANCE = 1e-4


def resnet_weights(rng: np.random.Generator, channels: int = 1) -> convert.Weights:
    """What a ResNet-10 of 2 features has in PyTorch, with its shortcuts and its classifier."""
    found: convert.Weights = {}

    def conv(name: str, shape: tuple[int, ...]) -> None:
        found[f"{name}.weight"] = rng.normal(size=shape).astype(np.float32)

    def norm(name: str, channels: int) -> None:
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.{leaf}"] = rng.uniform(0.5, 1.5, channels).astype(np.float32)
        found[f"{name}.num_batches_tracked"] = np.array(3)

    conv("conv1", (2, channels, 3, 3, 3))
    norm("bn1", 2)
    for i, (c, f) in enumerate(((2, 2), (2, 4), (4, 4), (4, 4)), start=1):
        conv(f"layer{i}.0.conv1", (f, c, 3, 3, 3))
        conv(f"layer{i}.0.conv2", (f, f, 3, 3, 3))
        norm(f"layer{i}.0.bn1", f)
        norm(f"layer{i}.0.bn2", f)
        if i > 1:
            conv(f"layer{i}.0.downsample.0", (f, c, 1, 1, 1))
            norm(f"layer{i}.0.downsample.1", f)
    conv("fc", (3, 4))
    return found


def vit_weights(patch: int, channels: int = 1, features: int = 8) -> convert.Weights:
    """What MONAI's ViT of one block has, on 2×2×2 tokens of `patch` voxels an axis, embedded by a linear map."""
    f, h = features, 12
    shapes = {
        "patch_embedding.position_embeddings": (1, 8, f), "patch_embedding.patch_embeddings.1.bias": (f,),
        "patch_embedding.patch_embeddings.1.weight": (f, patch**3 * channels), "blocks.0.attn.qkv.weight": (3 * f, f),
        "blocks.0.attn.out_proj.weight": (f, f), "blocks.0.attn.out_proj.bias": (f,), "blocks.0.mlp.linear1.weight":
        (h, f), "blocks.0.mlp.linear1.bias": (h,), "blocks.0.mlp.linear2.weight": (f, h), "blocks.0.mlp.linear2.bias":
        (f,),
    }  # fmt: skip
    norms = [f"{norm}.{leaf}" for norm in ("blocks.0.norm1", "blocks.0.norm2", "norm") for leaf in ("weight", "bias")]
    return {name: np.ones(shape, np.float32) for name, shape in (shapes | dict.fromkeys(norms, (f,))).items()}


def write_safetensors(file: Path, weights: convert.Weights, prefix: str = "") -> Path:
    """From the format's definition; float32 as it is, integers as 64 bits."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, array in weights.items():
        array = array if array.dtype == np.float32 else array.astype(np.int64)
        kind = "F32" if array.dtype == np.float32 else "I64"
        header[prefix + name] = {
            "dtype": kind, "shape": list(array.shape), "data_offsets": [len(body), len(body) + array.nbytes],
        }  # fmt: skip
        body += array.tobytes()
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return file


def test_a_file_becomes_parameters(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    weights = resnet_weights(np.random.default_rng(0))
    file = write_safetensors(tmp_path / "w.safetensors", weights, "module.")
    convert.main([f"--from={file}", f"--to={tmp_path / 'out'}", "--model=resnet", "--model.pool=(1, 2, 2)"])
    told = capsys.readouterr().out
    assert "unused    fc.weight" in told
    assert "60 matched, 0 reshaped, 0 missing, 1 unused" in told
    tree, about = convert.load(tmp_path / "out")
    assert about["model"]["depth"] == 10
    assert about["model"]["norm"] == "batch_frozen"
    assert (about["axes"], about["channels"]) == ("xyz", 1)
    assert len(about["source"]["sha256"]) == 64
    kernel = tree["backbone"]["layer1_block0"]["shortcut"]["conv"]["kernel"]
    np.testing.assert_array_equal(kernel[0, 0, 0], weights["layer2.0.downsample.0.weight"][:, :, 0, 0, 0].T)
    np.testing.assert_array_equal(tree["backbone"]["stem"]["norm"]["variance"], weights["bn1.running_var"])
    assert [p.name for p in (tmp_path / "out").iterdir()] == [convert.FILE]
    # The options it tells build a network that takes the parameters as they are.
    net = models.build(about["model"], jnp.float32)
    assert net.total_factor() == (8, 16, 16)
    like = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, 8, 16, 16, 1))))["params"]
    assert jax.tree.map(jnp.shape, tree["backbone"]) == jax.tree.map(lambda s: s.shape, like)
    # A run of four contrasts begins from them: the stem averaged, all the rest as it is, frozen statistics too.
    config = config_lib.defaults()
    with config.ignore_type():
        config.model = about["model"]
        config.data.patch = (8, 16, 16)
    here = transfer.describe(config, Model(net, {}), ("T1", "T1c", "T2", "FLAIR"))
    source = transfer.read(tmp_path / "out")
    with pytest.raises(UserError, match=r"1 channel\(s\) there, 4 here: init.channels="):
        transfer.match(source, here, config.init)
    config.init.channels = "average"
    start = transfer.match(source, here, config.init)
    assert not start.missing
    assert not start.unused
    stem = "backbone/stem/conv/kernel"
    assert list(start.reshaped) == [stem]
    for path, array in start.params.items():
        if path == stem:
            want = np.repeat(weights["conv1.weight"].transpose(2, 3, 4, 1, 0) / 4, 4, axis=3)
            np.testing.assert_allclose(array, want, rtol=1e-6)
        else:
            np.testing.assert_array_equal(array, source.params[path])


def test_statistics_come_from_a_source_or_the_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, about = convert.convert(resnet_weights(np.random.default_rng(3)), "resnet", options={"decoder": "unet"})
    config = config_lib.defaults()
    with config.ignore_type():
        config.model = about["model"]
        config.data.patch = models.build(about["model"], jnp.float32).total_factor()
    net = Model(models.build(about["model"], jnp.float32), {})
    with pytest.raises(UserError, match="'batch_frozen' keeps the statistics of converted .* init.source is empty"):
        transfer.open_start(config, net, ("T1",), tmp_path)
    bare = {k: v for k, v in done.params.items() if not k.endswith(("/mean", "/variance"))}
    config.init.source = str(convert.save(tmp_path / "bare", bare, about).parent)
    with pytest.raises(UserError, match=r"bare.* holds none: backbone/.* and \d+ more have no statistics"):
        transfer.open_start(config, net, ("T1",), tmp_path)
    some = {k: v for k, v in done.params.items() if "/stem/" not in k}
    config.init.source = str(convert.save(tmp_path / "some", some, about).parent)
    monkeypatch.setattr("medjax.errors._said", set())
    assert transfer.open_start(config, net, ("T1",), tmp_path)
    assert "backbone/stem/norm have no statistics" in capsys.readouterr().err
    config.init.source = str(convert.save(tmp_path / "whole", done.params, about).parent)
    assert transfer.open_start(config, net, ("T1",), tmp_path)
    assert "no statistics" not in capsys.readouterr().err


def test_axes_of_the_file_are_turned() -> None:
    weights = resnet_weights(np.random.default_rng(1))
    done, about = convert.convert(weights, "resnet", axes="zyx")
    assert about["axes"] == "zyx"
    want = weights["conv1.weight"].transpose(4, 3, 2, 1, 0)  # [out, in, z, y, x] -> [x, y, z, in, out]
    np.testing.assert_array_equal(done.params["backbone/stem/conv/kernel"], want)


def test_what_does_not_fit_is_refused_in_words(tmp_path: Path) -> None:
    weights = resnet_weights(np.random.default_rng(2))
    with pytest.raises(UserError, match=r"'conv1.weight' of shape .* does not fit 'backbone/stem/conv/kernel'"):
        convert.convert(weights, "resnet", options={"stem_kernel": (7, 7, 7)})
    with pytest.raises(UserError, match="no weights of a DenseNet.*begin: conv1.weight"):
        convert.convert(weights, "densenet")
    with pytest.raises(UserError, match=r"'model\.depht': did you mean 'model\.depth'"):
        convert.convert(weights, "resnet", options={"depht": 18})
    with pytest.raises(UserError, match="--source 'timm' is not known for resnet; known: monai, medicalnet"):
        convert.convert(weights, "resnet", source="timm")
    with pytest.raises(UserError, match="no segmentation head"):
        convert.convert(weights, "resnet", task="lesion")
    with pytest.raises(UserError, match="neither xyz nor zyx"):
        convert.convert(weights, "resnet", axes="xzy")
    shapes = {"backbone/stem/conv/kernel": (3, 3, 3, 1, 2)}
    with pytest.raises(UserError, match="not one of the 1 arrays"):
        convert.match({"other.weight": np.zeros(3)}, shapes, convert.Recipe({}, "xyz", 1, ()))
    with pytest.raises(UserError, match="no such file"):
        convert.read(tmp_path / "none.pth")
    (tmp_path / "bad.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json at all!")
    with pytest.raises(UserError, match="no .safetensors file, or damaged"):
        convert.read(tmp_path / "bad.safetensors")
    (tmp_path / convert.FILE).write_bytes(b"PK nothing")
    with pytest.raises(UserError, match="no file of python -m medjax.convert"):
        convert.load(tmp_path)
    file = write_safetensors(tmp_path / "w.safetensors", weights)
    with pytest.raises(UserError, match="unknown argument '--modle.depth=10'"):
        convert.main([f"--from={file}", f"--to={tmp_path}", "--model=resnet", "--modle.depth=10"])


@pytest.mark.parametrize(
    ("model", "stem"),
    [
        ("resnet", "conv1.weight"),
        ("densenet", "features.conv0.weight"),
        ("swin_unetr", "swinViT.patch_embed.proj.weight"),
        ("mednext", "stem.weight"),
        ("resenc", "encoder.stages.0.blocks.0.conv1.conv.weight"),
        ("vit", "patch_embedding.patch_embeddings.weight"),
    ],
)
def test_flat_weights_are_refused(model: str, stem: str) -> None:
    """Networks for pictures, such as torchvision's, have the names of those for volumes and one axis less."""
    weights = {k: v[..., 0] if v.ndim == 5 else v for k, v in resnet_weights(np.random.default_rng(4)).items()}
    if model == "vit":
        weights |= {k: v for k, v in vit_weights(16).items() if "embeddings.1" not in k}
    weights |= {"encoder.stem.convs.0.conv.weight": np.ones((4, 1, 3, 3)), stem: np.ones((4, 3, 7, 7), np.float32)}
    with pytest.raises(
        UserError, match=rf"'{stem.removeprefix('swinViT.')}' of shape .* is the kernel of a 2D convolution"
    ):
        convert.convert(weights, model)


def test_files_that_lack_what_tells_the_network_are_refused(tmp_path: Path) -> None:
    dense = {"features.conv0.weight": np.ones((4, 1, 3, 3, 3)), "features.norm0.weight": np.ones(4)}
    with pytest.raises(UserError, match="no weights of a DenseNet, or not all"):
        convert.convert(dense, "densenet")
    swin = {"patch_embed.proj.weight": np.ones((12, 1, 2, 2, 2))}
    with pytest.raises(UserError, match="no weights of a Swin transformer: no 'layers1.0.blocks.0.attn"):
        convert.convert(swin, "swin")
    swin |= {"layers1.0.blocks.0.attn.relative_position_bias_table": np.ones((27, 2))}
    with pytest.raises(UserError, match="no weights of a Swin transformer, or not all"):
        convert.convert(swin, "swin")
    text = json.dumps(["a.weight"]).encode()
    (tmp_path / "list.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(UserError, match="no .safetensors file, or damaged: download it again .its header is no table"):
        convert.read(tmp_path / "list.safetensors")


@pytest.mark.parametrize(
    ("key", "value", "example"),
    [
        ("stem_stride", 2, r"\(1, 1, 1\)"),
        ("stem_stride", (2, 2), r"\(1, 1, 1\)"),
        ("stem_kernel", "7x7", r"\(7, 7, 7\)"),
        ("factors", 2, r"\(\(1, 1, 1\), \(2, 2, 2\)"),
        ("depth", "ten", "18"),
        ("shortcut_bias", 1, "False"),
    ],
)
def test_options_of_another_kind_are_refused(key: str, value: Any, example: str) -> None:
    weights = resnet_weights(np.random.default_rng(5))
    with pytest.raises(UserError, match=rf"model\.{key}=.*: a network 'resnet' needs .*, such as {example}"):
        convert.convert(weights, "resnet", options={key: value})
    convert.convert(weights, "resnet", options={"dilations": (1, 1, 2, 4), "decoder_convs": (1, 1, 1, 1)})


def test_what_the_file_does_not_tell_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Heads of the attention and, of a linear embedding, the voxels of a token: any that fit the shapes load."""
    file = write_safetensors(tmp_path / "v.safetensors", vit_weights(16, features=128))
    command = [f"--from={file}", f"--to={tmp_path / 'out'}", "--model=vit"]
    convert.main(command)
    told = capsys.readouterr().out
    assert "NOTE      the file does not tell the number of attention heads: taken as 2 (128 features)" in told
    assert "NOTE      the file does not tell the voxels of a token: taken as 16×16×16 of 1 channel(s)" in told
    convert.main([*command, "--model.heads=4", "--model.patch=(16,16,16)"])
    assert "NOTE" not in capsys.readouterr().out
    assert convert.load(tmp_path / "out")[1]["model"]["heads"] == 4
    with pytest.raises(UserError, match=r"made of 64 values, no multiple of 16×16×16 voxels; .*--model.patch="):
        convert.convert(vit_weights(4), "vit")
    assert not convert.convert(vit_weights(4), "vit", options={"patch": (4, 4, 4)})[0].missing


def test_arrays_of_the_network_that_find_no_place_are_said_loudly(tmp_path: Path, capsys: Any) -> None:
    weights = resnet_weights(np.random.default_rng(6))
    file = write_safetensors(tmp_path / "w.safetensors", weights)
    convert.main([f"--from={file}", f"--to={tmp_path / 'out'}", "--model=resnet"])
    assert "NOTE" not in capsys.readouterr().out  # 'fc' is a head
    weights["layer2.0.se.fc1.weight"] = np.ones((2, 4), np.float32)
    file = write_safetensors(tmp_path / "w.safetensors", weights)
    convert.main([f"--from={file}", f"--to={tmp_path / 'out'}", "--model=resnet"])
    told = capsys.readouterr().out
    assert re.search(r"NOTE +1 unused array\(s\) .*: layer2.0.se.fc1.weight. .* COMPUTES SOMETHING ELSE", told)


def test_residual_convolutions_of_swin_are_refused() -> None:
    weights = {"patch_embed.proj.weight": np.ones((12, 1, 2, 2, 2)), "layers1c.0.layer.conv1.conv.weight": np.ones(3)}
    for prefix in ("", "swinViT."):
        with pytest.raises(UserError, match=r"SwinUNETR\(use_v2=True\)"):
            convert.convert({prefix + k: v for k, v in weights.items()}, "swin_unetr")


def test_without_torch_a_clear_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(UserError, match="needs torch"):
        convert.read(tmp_path / "w.pth")


def test_half_precision_is_widened(tmp_path: Path) -> None:
    values = np.array([1.5, -2.0, 3.25], np.float32)
    body = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    header = json.dumps({"a.weight": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}).encode()
    (tmp_path / "h.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + body)
    np.testing.assert_array_equal(convert.read(tmp_path / "h.safetensors")["a.weight"], values)


# --- against PyTorch -------------------------------------------------------------------------------------------------


def randomised(net: Any) -> Any:
    """Weights of unit gain and statistics that are not those of a new network, from a seed; in evaluation mode."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if not value.is_floating_point():
                continue
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5)
            elif value.ndim >= 2 and "position" not in name and "table" not in name:
                value.normal_(0, 1.0 / np.sqrt(value[0].numel()))
            elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight")) or ".bn" in name:
                value.uniform_(0.5, 1.5)
            else:
                value.normal_(0, 0.3)
    return net.eval()


def agree(
    net: Any, model: str, shape: tuple[int, ...], tmp_path: Path, reference: Callable[[Any], list[Any]], **options: Any
) -> None:
    """The converted network's outputs equal `reference(image)`: channels first, coarsest arguments as PyTorch has them.

    With `task` the head's logits are compared, else as many levels of the pyramid as the reference has, coarsest last.
    """
    import torch

    zyx, named = options.pop("zyx", False), options.pop("named", str)
    torch.save({"state_dict": {named(k): v for k, v in net.state_dict().items()}}, tmp_path / "w.pth")
    done, about = convert.convert(convert.read(tmp_path / "w.pth"), model, **options)
    assert done.missing == []
    assert not [note for note in done.notes if "COMPUTES SOMETHING ELSE" in note]
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    turn = (0, 4, 3, 2, 1) if zyx else (0, 4, 1, 2, 3)
    with torch.no_grad():
        want = reference(torch.from_numpy(np.ascontiguousarray(image.transpose(turn))))
    backbone = models.build(about["model"], jnp.float32)
    heads = {about["task"]: DenseHead(about["classes"])} if "task" in about else {}
    convert.save(tmp_path / "out", done.params, about)
    tree, _ = convert.load(tmp_path / "out")
    if heads:
        got = jax.jit(Model(backbone, heads).apply)({"params": tree}, image)[about["task"]]
    else:
        got = jax.jit(backbone.apply)({"params": tree["backbone"]}, image)[-len(want) :]
    back = (0, 4, 3, 2, 1) if zyx else (0, 2, 3, 4, 1)
    for ours, theirs in zip(got, want, strict=True):
        theirs = theirs.numpy().transpose(back)
        assert np.abs(theirs).max() > 0.05
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.peers
@pytest.mark.parametrize(("depth", "options"), [(10, {}), (18, {"shortcut_type": "A"}), (34, {}), (50, {})])
def test_resnet_equals_monai(depth: int, options: dict[str, Any], tmp_path: Path) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    make = getattr(nets, f"resnet{depth}")
    net = randomised(make(n_input_channels=2, feed_forward=False, widen_factor=0.125, **options))

    def reference(x: Any) -> list[Any]:
        x = net.act(net.bn1(net.conv1(x)))
        levels = [x]
        x = net.maxpool(x)
        for layer in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = layer(x)
            levels.append(x)
        return levels

    agree(net, "resnet", (2, 16, 32, 16, 2), tmp_path, reference)


@pytest.mark.peers
def test_resnet_equals_medicalnet(tmp_path: Path) -> None:
    """MedicalNet's ResNet-18 from its definition: stride 2 in the stem, dilated third and fourth layers, shortcut A."""
    torch = pytest.importorskip("torch")
    nn: Any = torch.nn
    F = torch.nn.functional

    class Block(nn.Module):
        def __init__(self, c: int, f: int, stride: int, dilation: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv3d(c, f, 3, stride, dilation, dilation, bias=False)
            self.conv2 = nn.Conv3d(f, f, 3, 1, dilation, dilation, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm3d(f), nn.BatchNorm3d(f)
            self.stride = stride

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            short = F.avg_pool3d(x, 1, self.stride)
            return F.relu(y + F.pad(short, (0,) * 7 + (y.shape[1] - x.shape[1],)))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv3d(1, 8, 7, 2, 3, bias=False), nn.BatchNorm3d(8)
            for i, (c, f, s, d) in enumerate(((8, 8, 1, 1), (8, 16, 2, 1), (16, 32, 1, 2), (32, 64, 1, 4)), start=1):
                setattr(self, f"layer{i}", nn.Sequential(Block(c, f, s, d), Block(f, f, 1, d)))

        def forward(self, x: Any) -> Any:
            x = F.max_pool3d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
            return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    net = randomised(nn.DataParallel(Net())).module
    agree(net, "resnet", (1, 32, 16, 32, 1), tmp_path, lambda x: [net(x)], source="medicalnet")


@pytest.mark.peers
@pytest.mark.parametrize("depth", [121, 169])
def test_densenet_equals_monai(depth: int, tmp_path: Path) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    make = getattr(nets, f"DenseNet{depth}")
    net = randomised(make(spatial_dims=3, in_channels=2, out_channels=3, init_features=8, growth_rate=4))
    agree(net, "densenet", (1, 32, 64, 32, 2), tmp_path, lambda x: [net.features(x).relu()])


@pytest.mark.peers
@pytest.mark.parametrize("residual", [False, True])
def test_nnunet_equals_its_package(residual: bool, tmp_path: Path) -> None:
    unet = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    from torch import nn

    common = {
        "input_channels": 2, "n_stages": 3, "features_per_stage": (4, 6, 8), "conv_op": nn.Conv3d,
        "kernel_sizes": ((1, 3, 3), (3, 3, 3), (3, 3, 3)), "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 2)),
        "num_classes": 3, "conv_bias": True, "norm_op": nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": nn.LeakyReLU, "deep_supervision": True,
    }  # fmt: skip
    if residual:
        made = unet.ResidualEncoderUNet(n_blocks_per_stage=(1, 2, 2), n_conv_per_stage_decoder=(1, 2), **common)
    else:
        made = unet.PlainConvUNet(n_conv_per_stage=(2, 2, 1), n_conv_per_stage_decoder=(1, 2), **common)
    net = randomised(made)
    model = "resenc" if residual else "nnunet"
    agree(net, model, (2, 16, 8, 8, 2), tmp_path, lambda x: [net(x)[0]], task="lesion", zyx=True)


@pytest.mark.peers
@pytest.mark.parametrize(("names", "kernel"), [("monai", 3), ("paper", 3), ("monai", 5)])
def test_mednext_equals_monai(names: str, kernel: int, tmp_path: Path) -> None:
    """By MONAI's names, and by those of the paper's own code, whose axes are (z, y, x)."""
    nets = pytest.importorskip("monai.networks.nets")
    net = randomised(
        nets.MedNeXt(
            init_filters=4,
            in_channels=2,
            out_channels=3,
            encoder_expansion_ratio=(2, 3),
            kernel_size=kernel,
            decoder_expansion_ratio=(3, 2),
            bottleneck_expansion_ratio=4,
            use_residual_connection=True,
            blocks_down=(1, 2),
            blocks_bottleneck=2,
            blocks_up=(2, 1),
        )
    )

    def rename(name: str) -> str:
        for theirs, paper in (("enc_stages.", "enc_block_"), ("down_blocks.", "down_")):
            name = name.replace(theirs, paper)
        for theirs, paper in (("up_blocks.", "up_"), ("dec_stages.", "dec_block_")):
            for i in range(2):
                name = name.replace(f"{theirs}{i}", f"{paper}{1 - i}")
        return name

    paper = names == "paper"
    named = rename if paper else str
    agree(net, "mednext", (2, 8, 12, 16, 2), tmp_path, lambda x: [net(x)], task="lesion", zyx=paper, named=named)


@pytest.mark.peers
@pytest.mark.parametrize("source", ["monai", "monai_v2", "monai_legacy"])
def test_swin_unetr_equals_monai(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 3 on grids of 16, 8, 4 and 2 tokens: padded, shifted, exact and smaller than a window."""
    swin = pytest.importorskip("monai.networks.nets.swin_unetr")
    import torch

    if source == "monai_legacy":  # the merging of MONAI 0.9: two corners twice

        def merge(self: Any, x: Any) -> Any:
            corners = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))
            return self.reduction(self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in corners], -1)))

        monkeypatch.setattr(swin.PatchMerging, "forward", merge)
    net = randomised(
        swin.SwinUNETR(
            in_channels=2,
            out_channels=3,
            feature_size=12,
            window_size=3,
            num_heads=(2, 2, 4, 4),
            downsample="mergingv2" if source == "monai_v2" else "merging",
        )
    )
    agree(net, "swin_unetr", (1, 32, 64, 32, 2), tmp_path, lambda x: [net(x)], task="lesion", source=source)


@pytest.mark.peers
@pytest.mark.parametrize("embedding", ["conv", "perceptron"])
def test_unetr_equals_monai(embedding: str, tmp_path: Path) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    net = randomised(
        nets.UNETR(
            in_channels=2,
            out_channels=3,
            img_size=(32, 32, 48),
            feature_size=4,
            hidden_size=24,
            mlp_dim=32,
            num_heads=3,
            proj_type=embedding,
        )
    )
    options = {"heads": 3}
    agree(
        net, "unetr", (1, 32, 32, 48, 2), tmp_path, lambda x: [net(x)], task="lesion", options=options,
        image=(32, 32, 48),
    )  # fmt: skip


@pytest.mark.peers
def test_swin_unetr_of_the_second_version_is_refused() -> None:
    nets = pytest.importorskip("monai.networks.nets")
    net = nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12, use_v2=True)
    weights = {k: v.numpy() for k, v in net.state_dict().items()}
    with pytest.raises(UserError, match=r"SwinUNETR\(use_v2=True\)"):
        convert.convert(weights, "swin_unetr")


@pytest.mark.peers
def test_swin_alone_equals_monai(tmp_path: Path) -> None:
    swin = pytest.importorskip("monai.networks.nets.swin_unetr")
    net = randomised(
        swin.SwinTransformer(
            in_chans=2, embed_dim=8, window_size=(3, 3, 3), patch_size=(2, 2, 2), depths=(2, 2, 2, 2),
            num_heads=(2, 2, 4, 4), spatial_dims=3, downsample="mergingv2",
        )
    )  # fmt: skip
    agree(net, "swin", (1, 32, 64, 32, 2), tmp_path, lambda x: list(net(x)), source="monai_v2")


@pytest.mark.peers
def test_vit_alone_equals_monai(tmp_path: Path) -> None:
    nets = pytest.importorskip("monai.networks.nets")
    grid = (2, 2, 3)
    net = randomised(
        nets.ViT(
            in_channels=2, img_size=tuple(16 * n for n in grid), patch_size=16, hidden_size=24, mlp_dim=32,
            num_layers=3, num_heads=3,
        )
    )  # fmt: skip

    def reference(x: Any) -> list[Any]:
        tokens = net(x)[0]
        return [tokens.transpose(1, 2).reshape(len(x), 24, *grid)]

    image = tuple(16 * n for n in grid)
    agree(net, "vit", (1, *image, 2), tmp_path, reference, options={"heads": 3}, image=image)


@pytest.mark.peers
def test_pickled_code_is_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"state_dict": {"a.weight": torch.ones(2)}, "extra": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match=r"pickled objects besides weights .*is not opened"):
        convert.read(tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()
    # What nnU-Net's checkpoints hold besides weights is plain data.
    log = {"train_losses": [np.float32(0.5), np.float64(1.0)], "plans": {"patch": (1, 2)}}
    torch.save({"network_weights": {"a.weight": torch.ones(2)}, "logging": log}, tmp_path / "fold.pth")
    np.testing.assert_array_equal(convert.read(tmp_path / "fold.pth")["a.weight"], np.ones(2))


@pytest.mark.peers
def test_what_is_no_checkpoint_is_not_called_code(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    file, again = tmp_path / "w.pth", "is no PyTorch checkpoint, or damaged: download it again"
    whole = io.BytesIO()
    torch.save({"a.weight": torch.arange(999.0)}, whole)
    old = io.BytesIO()
    torch.save({"a.weight": torch.arange(999.0)}, old, _use_new_zipfile_serialization=False)
    page = b"<!DOCTYPE html><html><title>Sign in</title></html>"
    pointer = b"version https://git-lfs.github.com/spec/v1"
    parts = [content.getvalue()[:n] for content in (whole, old) for n in (5, 40, 300, 3000)]
    for content in (page, pointer, b"", b"\x1f\x8b\x08junk", old.getvalue()[:100] + b"z" * 300, *parts):
        file.write_bytes(content)
        with pytest.raises(UserError, match=again):
            convert.read(file)
    file.write_bytes(pickle.dumps({"a.weight": np.ones(3)}, protocol=4))
    with pytest.raises(UserError, match="holds pickled objects besides weights"):
        convert.read(file)


@pytest.mark.peers
def test_parameters_that_have_gradients_are_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    net = torch.nn.Sequential(torch.nn.Linear(2, 3))
    torch.save(dict(net.named_parameters()), tmp_path / "w.pth")
    np.testing.assert_array_equal(convert.read(tmp_path / "w.pth")["0.weight"], net[0].weight.detach().numpy())
    torch.save({"model": dict(net.named_parameters()), 0: 1}, tmp_path / "w.pth")
    assert set(convert.read(tmp_path / "w.pth")) == {"0.weight", "0.bias"}
    torch.save({0: torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="no table of weights in it"):
        convert.read(tmp_path / "w.pth")
