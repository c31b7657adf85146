"""Converters: files, layouts, the command; and the same weights giving the same output as in PyTorch (peers)."""

from __future__ import annotations

import json
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
