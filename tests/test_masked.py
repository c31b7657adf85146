"""Masked pretraining: what is visible does not count, what is hidden is not seen, the spine trains and judges it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import layouts
import numpy as np
import pytest
from matplotlib.image import imread
from tiny import RECIPE, write_cohort

from medjax import main, predict, tasks
from medjax.errors import UserError
from medjax.losses import reconstruction
from medjax.models.densenet import DenseNet
from medjax.models.inception import Inception
from medjax.models.layers import GroupNormAct, InstanceNormAct
from medjax.models.mednext import MedNeXt
from medjax.models.model import Model
from medjax.models.nnunet import NNUNet, ResEncUNet
from medjax.models.resnet import ResNet
from medjax.models.sparse import Sparse, hide, spread
from medjax.models.swin import Swin
from medjax.models.unet import UNet
from medjax.models.vit import UNETR, ViT
from medjax.tasks.autoregressive import Autoregressive
from medjax.tasks.masked import Masked

SIZE, BLOCK = (16, 16, 16), (4, 4, 4)
RNG = np.random.default_rng(0)
IMAGE = jnp.asarray(RNG.normal(size=(2, *SIZE, 2)), jnp.float32)
NETS: dict[str, Any] = {
    "unet": UNet(features=(4, 8), convs=1, decoder_convs=1),
    "nnunet": NNUNet(features=(4, 8), blocks=1, decoder_convs=1),
    "resenc": ResEncUNet(features=(4, 8), blocks=1, decoder_convs=1),
    "mednext": MedNeXt(features=4, blocks=(1, 1, 1), expansions=(2, 2, 2)),
    "resnet": ResNet(depth=10, features=(4, 8), factors=((1, 1, 1), (2, 2, 2)), stem_kernel=(3, 3, 3)),
    "densenet": DenseNet(
        blocks=(2, 1), features=6, growth=4, width=2, stem_kernel=(3, 3, 3), stem_stride=(1, 1, 1), factors=((2, 2, 2),)
    ),
    "inception": Inception(width=1 / 32, stem_stride=(1, 1, 1), factors=((2, 2, 2), (2, 2, 2), (1, 1, 1), (1, 1, 1))),
}


def batch_of(image: jax.Array = IMAGE) -> dict[str, Any]:
    rows, channels = image.shape[0], image.shape[-1]
    return {
        "image": image,
        "modality": jnp.ones((rows, channels), bool),
        "spacing": jnp.ones((rows, 3)),
        "example": jnp.arange(rows),
        "valid": jnp.ones(rows, bool),
    }


def prepared(task: Any, seed: int, batch: dict[str, Any]) -> dict[str, Any]:
    """`batch` with the task's part; as one program, which compiles in a fraction of the time."""
    return jax.jit(lambda b: task.prepare(jax.random.key(seed), b))(batch)


def parameters(net: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Initial parameters, moved so that no bias is 0 and no scale 1."""
    made = jax.jit(lambda: net.init(jax.random.key(0), *args, **kwargs))()
    return jax.tree.map(lambda a: a + 0.1 * jnp.asarray(np.random.default_rng(1).normal(size=a.shape), a.dtype), made)


# ---- the loss


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("objective", ["l2", "l1"])
def test_the_loss_by_hand(objective: str, normalize: bool) -> None:
    task = Masked("m", block=BLOCK, objective=objective, normalize=normalize)
    batch = prepared(task, 0, batch_of())
    batch["modality"] = jnp.asarray([[True, False], [True, True]])
    hidden = ~batch["m/visible"]
    prediction = jnp.asarray(RNG.normal(size=IMAGE.shape), jnp.float32)
    found = task.loss([prediction, hidden], batch)
    for row in range(2):
        errors = []
        for block in np.argwhere(np.asarray(hidden[row])):
            at = tuple(slice(4 * i, 4 * i + 4) for i in block)
            for channel in range(2 if row else 1):
                want = np.asarray(IMAGE[row])[(*at, channel)].astype(np.float64)
                if normalize:
                    want = (want - want.mean()) / np.sqrt(want.var() + 1e-6)
                gap = np.asarray(prediction[row])[(*at, channel)] - want
                errors.append(np.mean(gap**2 if objective == "l2" else np.abs(gap)))
        assert float(found[row]) == pytest.approx(np.mean(errors), rel=1e-5)


def test_what_is_visible_does_not_count() -> None:
    task = Masked("m", block=BLOCK, ratio=0.6)
    batch = prepared(task, 0, batch_of())
    hidden = ~batch["m/visible"]
    prediction = jnp.asarray(RNG.normal(size=IMAGE.shape), jnp.float32)
    seen = spread(batch["m/visible"], SIZE)[..., None]
    value, gradient = jax.value_and_grad(lambda p: task.loss([p, hidden], batch).sum())(prediction)
    wild = jnp.where(seen, jnp.nan, prediction)
    assert float(task.loss([wild, hidden], batch).sum()) == float(value)
    assert not np.asarray(jnp.where(seen, gradient, 0.0)).any()
    assert np.asarray(jnp.where(seen, 1.0, gradient)).all()


@pytest.mark.parametrize("kind", [Masked, Autoregressive])
@pytest.mark.parametrize("normalize", [False, True])
def test_padding_does_not_count(kind: Any, normalize: bool) -> None:
    """A volume in a larger patch is worth what it is worth alone, wherever in the blocks its border lies."""
    task = kind("m", normalize=normalize)
    prediction = jnp.asarray(RNG.normal(size=IMAGE.shape), jnp.float32)
    hidden = jnp.asarray(RNG.random((2, 4, 4, 4)) < 0.6)
    alone = {"image": IMAGE, "modality": jnp.asarray([[True, False], [True, True]])}
    measure = jax.jit(lambda p, hidden, b: task.measure([p, hidden], b))
    wanted = measure(prediction, hidden, alone)

    # Whole blocks of padding, some to be predicted, some not.
    around = ((0, 0), (4, 8), (0, 4), (8, 0), (0, 0))
    image = jnp.pad(IMAGE, around)
    grown = jnp.asarray(RNG.random((2, 7, 5, 6)) < 0.5).at[:, 1:5, 0:4, 2:6].set(hidden)
    more = jnp.asarray(RNG.normal(size=image.shape), jnp.float32).at[:, 4:20, 0:16, 8:24].set(prediction)
    found = measure(more, grown, {**alone, "image": image})
    for name in task.metrics:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-5)

    # Half a block of padding: the moments are of the other half, each of whose voxels counts as any other.
    image = IMAGE.at[:, :2].set(0.0)
    found = measure(prediction, hidden, {**alone, "image": image})
    for row in range(2):
        errors: list[float] = []
        for block in np.argwhere(np.asarray(hidden[row])):
            at = tuple(slice(max(4 * i, 2 if axis == 0 else 0), 4 * i + 4) for axis, i in enumerate(block))
            for channel in range(2 if row else 1):
                want = np.asarray(IMAGE[row])[(*at, channel)].astype(np.float64)
                want = (want - want.mean()) / np.sqrt(want.var() + 1e-6) if normalize else want
                errors += list(np.square(np.asarray(prediction[row])[(*at, channel)] - want).ravel())
        assert float(found["error"][row]) == pytest.approx(np.mean(errors), rel=1e-5)

    outside = (image == 0).all(-1, keepdims=True)
    loss = jax.jit(jax.value_and_grad(lambda p: task.loss([p, hidden], {**alone, "image": image}).sum()))
    value, gradient = loss(prediction)
    assert float(loss(jnp.where(outside, jnp.nan, prediction))[0]) == float(value)
    counted = spread(hidden, SIZE)[..., None] & ~outside & alone["modality"][:, None, None, None]
    np.testing.assert_array_equal(gradient != 0, counted)


@pytest.mark.parametrize("objective", ["l2", "l1"])
@pytest.mark.parametrize("normalize", [False, True])
def test_nothing_to_predict_is_worth_nothing(objective: str, normalize: bool) -> None:
    task = Masked("m", normalize=normalize, objective=objective)
    batch = {**batch_of(), "image": IMAGE.at[0].set(0.0)}
    outputs = [jnp.ones_like(IMAGE), jnp.ones((2, 4, 4, 4), bool)]
    assert {k: float(v[0]) for k, v in task.measure(outputs, batch).items()} == {"error": 0, "explained": 0}
    gradient = jax.grad(lambda p: task.loss([p, outputs[1]], batch).sum())(outputs[0])
    assert not np.asarray(gradient[0]).any()
    assert np.isfinite(np.asarray(gradient)).all()
    assert np.asarray(gradient[1]).all()
    # A channel that the example lacks is no sign of anything.
    batch |= {"image": jnp.zeros_like(IMAGE).at[..., 1].set(1.0), "modality": jnp.asarray([[True, False]] * 2)}
    assert not np.asarray(task.loss(outputs, batch)).any()
    shown = task.show(outputs, batch)
    assert not np.asarray(shown["prediction"][..., 0]).any()


def test_what_is_explained_is_more_than_the_mean_of_a_channel() -> None:
    """Two channels that lie far apart: to know that much is to know nothing."""
    apart = IMAGE + jnp.asarray([0.0, 50.0])
    hidden = jnp.asarray(RNG.random((2, 4, 4, 4)) < 0.6)
    counted = np.asarray(spread(hidden, SIZE))
    means = np.stack([np.asarray(apart)[row][counted[row]].mean(0) for row in range(2)])
    task, batch = Masked("m"), batch_of(apart)
    flat = jnp.broadcast_to(jnp.asarray(means)[:, None, None, None], IMAGE.shape)
    np.testing.assert_allclose(task.measure([flat, hidden], batch)["explained"], 0, atol=1e-4)
    half = task.measure([flat + 0.5 * (apart - flat), hidden], batch)["explained"]
    np.testing.assert_allclose(half, 0.75, atol=1e-4)


def test_flat_air_is_not_blown_up() -> None:
    """A block of little noise keeps it in proportion to the image; others have deviation 1, whatever the scale."""
    task = Masked("m", normalize=True)
    for scale in (1.0, 1e3):
        image = scale * (IMAGE.at[:, :4].set(1e-3 * IMAGE[:, :4]) + 1.0)
        hidden = jnp.ones((2, 4, 4, 4), bool)
        weight = reconstruction.weights(image, hidden, jnp.ones((2, 2), bool))
        std = np.asarray(reconstruction.targets(image, weight, True).std(4))
        np.testing.assert_allclose(std[:, 1:], 1.0, rtol=1e-3)
        own = np.asarray(image).std((1, 2, 3))
        blocks = np.asarray(reconstruction.to_blocks(image, (4, 4, 4)))[:, 0].std(3)
        np.testing.assert_allclose(std[:, 0], blocks / (0.05 * own[:, None, None]), rtol=1e-2)
        assert 0.01 < std[:, 0].max() < 0.04
        # What is shown is in the image's own values again.
        shown = task.show(
            [reconstruction.from_blocks(reconstruction.targets(image, weight, True), BLOCK), hidden], batch_of(image)
        )
        np.testing.assert_allclose(shown["prediction"], image[0], rtol=1e-4, atol=1e-4 * scale)


def test_blocks_are_as_many_as_asked_and_each_examples_own() -> None:
    task = Masked("m", block=BLOCK, ratio=0.6)
    whole = prepared(task, 0, batch_of())["m/visible"]
    assert (np.asarray(whole).sum((1, 2, 3)) == 64 - round(0.6 * 64)).all()
    assert (np.asarray(whole[0]) != np.asarray(whole[1])).any()
    second = {k: v[1:] for k, v in batch_of().items()}
    np.testing.assert_array_equal(prepared(task, 0, second)["m/visible"][0], whole[1])
    other = prepared(Masked("n", block=BLOCK, ratio=0.6), 0, batch_of())["n/visible"]
    assert (np.asarray(other) != np.asarray(whole)).any()


def test_blocks_are_the_voxels_they_say() -> None:
    blocks = reconstruction.to_blocks(IMAGE, (4, 2, 1))
    np.testing.assert_array_equal(reconstruction.from_blocks(blocks, (4, 8, 16)), IMAGE)
    np.testing.assert_array_equal(blocks[1, 2, 1, 0].reshape(4, 8, 16, 2), IMAGE[1, 8:12, 8:16])


# ---- the encoder sees what is visible


def encoded(net: nn.Module, params: Any, image: jax.Array, visible: jax.Array) -> list[jax.Array]:
    sparse = Sparse(visible)
    with nn.intercept_methods(sparse):
        pyramid: Any = net.apply(params, hide(image, visible))
    return sparse.levels or pyramid


@pytest.mark.parametrize("name", list(NETS))
def test_a_visible_box_is_encoded_as_if_it_were_all(name: str) -> None:
    """Statistics, convolutions and all: the dense net on the cropped box says the same, and elsewhere there is 0."""
    net = NETS[name]
    params = parameters(net, IMAGE)
    visible = jnp.zeros((2, 4, 4, 4), bool).at[:, 1:3, 0:3, 2:4].set(True)
    box = (slice(None), slice(4, 12), slice(0, 12), slice(8, 16))
    encode = jax.jit(lambda x, visible: encoded(net, params, x, visible))
    levels, alone = encode(IMAGE, visible), jax.jit(lambda x: dense_levels(net, params, x))(IMAGE[box])
    changed = jnp.where(spread(visible, SIZE)[..., None], IMAGE, 7.0)
    for level, want in zip(levels, alone, strict=True):
        factor = 16 // level.shape[1]
        inside = (slice(None), *(slice(s.start // factor, s.stop // factor) for s in box[1:]))
        # Inception normalises twenty times one after the other, here over as few as 12 voxels.
        np.testing.assert_allclose(level[inside], want, atol=1e-4 if name == "inception" else 2e-5)
        assert not np.asarray(hide(level, ~visible)).any()
    for level, want in zip(encode(changed, visible), levels, strict=True):
        np.testing.assert_array_equal(level, want)


def dense_levels(net: nn.Module, params: Any, image: jax.Array) -> list[jax.Array]:
    """The encoder's levels of a net that knows nothing of masks; its pyramid where it has no decoder."""
    from medjax.models.layers import Bridge

    kept: list[jax.Array] = []

    def keep(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Bridge) and context.method_name == "__call__":
            kept.extend(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(keep):
        pyramid: Any = net.apply(params, image)
    return kept or pyramid


def program(backbone: nn.Module, task: Masked) -> Any:
    """Outputs of a prepared batch, with parameters made once."""
    model = Model(backbone, {"m": task.head()})
    params = parameters(model, IMAGE, train=True)
    return jax.jit(lambda b: model.apply(params, b["image"], train=True, views=tasks.views({"m": task}, b))["m"])


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        (NETS["unet"], {"decoder": "light"}),
        (NETS["resenc"], {"decoder": "backbone"}),
        (NETS["resnet"], {"decoder": "light"}),
        (NETS["unet"], {"method": "simmim"}),
        (ViT(features=12, depth=2, heads=2, mlp=16, patch=(4, 4, 4)), {"features": 8, "heads": 2, "depth": 1}),
        (ViT(features=12, depth=1, heads=2, mlp=16, patch=(4, 4, 4)), {"method": "simmim"}),
        (UNETR(features=12, depth=4, heads=2, mlp=16, patch=(2, 2, 2), decoder_features=4), {"features": 8}),
        (Swin(features=6, depths=(1, 1), heads=(1, 2), window=(2, 2, 2)), {"method": "simmim"}),
    ],
    ids=["sparse", "own-decoder", "encoder", "simmim", "mae-vit", "simmim-vit", "mae-unetr", "simmim-swin"],
)
def test_hidden_voxels_are_never_seen(backbone: nn.Module, options: dict[str, Any]) -> None:
    task = Masked("m", block=BLOCK, **options)
    batch = prepared(task, 0, batch_of())
    run = program(backbone, task)
    prediction, counted = run(batch)
    np.testing.assert_array_equal(counted, ~batch["m/visible"])
    assert prediction.shape == IMAGE.shape
    assert prediction.dtype == jnp.float32
    hidden = spread(counted, SIZE)[..., None]
    changed = {**batch, "image": jnp.where(hidden, 9.0, IMAGE)}
    again, _ = run(changed)
    np.testing.assert_array_equal(again, prediction)
    seen = {**batch, "image": jnp.where(hidden, IMAGE, IMAGE + 1.5 * (IMAGE > 0))}
    other, _ = run(seen)
    assert float(jnp.abs(other - prediction).max()) > 1e-4


def test_a_transformer_sees_visible_tokens_alone() -> None:
    """The tokens of MAE are those a transformer makes of the visible ones, counted by hand."""
    task = Masked("m", block=(8, 4, 4), features=8, depth=1, heads=2)
    net = ViT(features=12, depth=1, heads=2, mlp=16, patch=(4, 4, 4))
    seen: list[tuple[int, ...]] = []

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if type(context.module).__name__ == "TransformerBlock" and context.module.name == "block0":
            seen.append(args[0].shape)
        return call(*args, **kwargs)

    model = Model(net, {"m": task.head()})
    params = parameters(model, IMAGE, train=True)
    batch = prepared(task, 0, batch_of())
    with nn.intercept_methods(note):
        model.apply(params, batch["image"], train=True, views=tasks.views({"m": task}, batch))
    assert seen == [(2, 16, 12), (2, 64, 8)]  # a quarter of the 64 tokens; then the decoder's


# ---- in bfloat16


@pytest.mark.parametrize("kind", [InstanceNormAct, GroupNormAct])
def test_statistics_of_what_is_visible_stay_float32(kind: Any) -> None:
    """Of 2048 voxels far from 0: sums in bfloat16, of 8 bits, would stand still at 256 times a voxel."""
    x = jnp.asarray(3 + RNG.normal(size=(1, *SIZE, 2)), jnp.bfloat16)
    visible = jnp.asarray(RNG.random((1, *SIZE)) < 0.5)
    net = kind(negative_slope=None) if kind is InstanceNormAct else kind(groups=1, negative_slope=None)
    y = jax.jit(lambda x, v: net.apply({"params": {"scale": jnp.ones(2), "bias": jnp.zeros(2)}}, x, v))(x, visible)
    assert y.dtype == jnp.bfloat16
    seen = np.asarray(x, np.float64)[np.asarray(visible)]
    over = 0 if kind is InstanceNormAct else None
    wanted = (seen - seen.mean(over)) / seen.std(over)
    np.testing.assert_allclose(np.asarray(y, np.float64)[np.asarray(visible)], wanted, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize(("name", "decoder"), [("unet", "backbone"), ("mednext", "light")])
def test_in_bfloat16_it_is_the_same_loss(name: str, decoder: str) -> None:
    """Losses and gradients within what 8 bits leave of them; predictions and gradients are float32."""
    task = Masked("m", block=BLOCK, decoder=decoder, features=8)
    batch = prepared(task, 0, batch_of())
    params = parameters(Model(NETS[name], {"m": task.head()}), IMAGE, train=True)
    found = []
    for dtype in (jnp.float32, jnp.bfloat16):
        model = Model(NETS[name].clone(dtype=dtype), {"m": task.head()})

        def loss(params: Any, model: Any = model) -> Any:
            outputs = model.apply(params, batch["image"], train=True, views=tasks.views({"m": task}, batch))["m"]
            return task.loss(outputs, batch).mean(), outputs[0]

        (value, prediction), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        assert prediction.dtype == jnp.float32
        assert {g.dtype for g in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
        flat = np.concatenate([np.ravel(g) for g in jax.tree.leaves(gradient)])
        found.append((float(value), np.asarray(prediction), flat))
    (value, prediction, gradient), (close, near, slope) = found
    assert close == pytest.approx(value, rel=2e-2)
    assert close != value
    assert np.linalg.norm(near - prediction) < 0.03 * np.linalg.norm(prediction)
    # Tokens stand in thousands of voxels: summed in bfloat16 their gradients alone were off by a tenth of the whole.
    assert np.linalg.norm(slope - gradient) < 0.03 * np.linalg.norm(gradient)


# ---- refusals


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5])
def test_ratio_is_a_share(ratio: float) -> None:
    with pytest.raises(UserError, match=r"tasks\.m\.ratio"):
        Masked("m", ratio=ratio)


@pytest.mark.parametrize("option", [{"features": 0}, {"depth": -1}, {"heads": 0}, {"heads": -2}])
def test_sizes_of_the_light_decoder(option: dict[str, int]) -> None:
    ((key, value),) = option.items()
    with pytest.raises(UserError, match=rf"tasks\.m\.{key}={value}: needs a number from"):
        Masked("m", **option)  # type: ignore[arg-type]


def test_what_cannot_be_masked_is_refused() -> None:
    with pytest.raises(UserError, match="hides 0"):
        Masked("m", ratio=0.2).check((32, 16, 16))
    with pytest.raises(UserError, match="whole blocks"):
        Masked("m").check((40, 16, 16))
    with pytest.raises(UserError, match="method='nae' is not known"):
        Masked("m", method="nae")
    small = Masked("m", block=(4, 4, 4))
    deep = UNet(features=(4, 4, 4, 4), convs=1, decoder_convs=1)
    swin = Swin(features=6, depths=(1, 1), heads=(1, 2), window=(2, 2, 2))
    own = Masked("m", block=BLOCK, decoder="backbone")
    vit = ViT(features=12, depth=1, heads=2, mlp=16, patch=(4, 4, 4))
    for net, task, message in (
        (vit, Masked("m", block=BLOCK, features=9, heads=2), "no multiple of its heads 2"),
        (deep, small, "multiple of the network's total downsampling"),
        (NETS["resnet"], own, "no decoder of its own"),
        (vit, own, "decoder='backbone' is for convolutional networks, not ViT"),
        (UNETR(features=12, depth=4, heads=2, mlp=16, patch=(2, 2, 2), decoder_features=4), own, "not UNETR"),
        (swin, small, "use 'simmim'"),
        (swin.clone(remat=True), small, "use 'simmim'"),
    ):
        model = Model(net, {"m": task.head()})
        with pytest.raises(UserError, match=message):
            jax.eval_shape(lambda model=model: model.init(jax.random.key(0), IMAGE, train=True))


# ---- through the spine


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cohort(tmp_path_factory.mktemp("masked") / "cohort")


def recipe(file: Path, cohort: Path, tasks: str) -> Path:
    text = RECIPE.format(cohort=str(cohort))
    file.write_text(text.replace('{"spheres": {"type": "segmentation", "levels": 1}}', tasks))
    return file


def test_pretraining_alone(cohort: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator
    from tensorboard.util.tensor_util import make_ndarray

    file = recipe(tmp_path / "mae.py", cohort, '{"mae": {"type": "masked", "block": (4, 4, 4), "decoder": "backbone"}}')
    run = tmp_path / "run"
    main.main([f"--config={file}", f"--workdir={run}"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["train/loss"]) for row in rows if "train/loss" in row)
    judged = [row for row in rows if "val/error" in row]
    assert [row["step"] for row in judged] == [4, 8]
    assert all(row["val/score"] == pytest.approx(max(0, row["val/explained"]), abs=1e-6) for row in judged)
    assert judged[-1]["val/error"] == pytest.approx(judged[-1]["val/loss"], rel=1e-4)
    events = event_accumulator.EventAccumulator(str(run / "tensorboard"), {"tensors": 0})
    events.Reload()
    shown = {event.step: make_ndarray(event.tensor_proto) for event in events.Tensors("mae/0")}
    for step in (4, 8):
        # Width, height, and the PNG's bytes: the picture in the folder.
        picture = imread(run / "pretext" / f"mae_0_{step:07d}.png")
        width, height, png = shown[step].tolist()
        assert (int(height), int(width)) == picture.shape[:2]
        np.testing.assert_array_equal(imread(io.BytesIO(png))[..., :3], picture[..., :3])
    summary = json.loads((run / "eval" / "val" / "summary.json").read_text())
    best = max(judged, key=lambda row: row["val/score"])
    assert summary["metrics"]["error"]["mean"] == pytest.approx(best["val/error"], rel=1e-4)
    assert not list((run / "eval").rglob("*.nii.gz"))
    assert (run / "eval" / "val" / "mae_0.png").exists()
    with pytest.raises(UserError, match="only self-supervised"):
        predict.main([f"--run={run}", f"--input={cohort / 'imagesTr'}", f"--output={tmp_path / 'out'}"])


def test_a_run_goes_on_with_other_devices_as_it_would_have(cohort: Path, tmp_path: Path) -> None:
    """4 steps on one device, and the last 2 of them on two devices: the same losses, of the same hidden blocks."""
    file = recipe(tmp_path / "mae.py", cohort, '{"mae": {"type": "masked", "block": (4, 4, 4), "decoder": "backbone"}}')

    def run(name: str, devices: int) -> dict[int, float]:
        given = ("optim.name=sgd", "optim.lr=0.01", "train.total=4 steps", "train.checkpoint_every=2 steps")
        call = layouts.arguments(file, tmp_path / name, *layouts.BARE, *given)
        (process,) = layouts.start([call], devices=devices, log=tmp_path / f"{name}.log")
        assert process.wait() == 0, (tmp_path / f"{name}.log.0").read_text()
        return layouts.losses(tmp_path / name)

    want = run("whole", 1)
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    for left_out in ("latest/4", "best"):
        shutil.rmtree(tmp_path / "moved" / "checkpoints" / left_out)
    (tmp_path / "moved" / "metrics.jsonl").unlink()
    found = run("moved", 2)
    assert len(set(want.values())) == 4
    assert found == pytest.approx({step: want[step] for step in (3, 4)}, rel=1e-5)


def test_pretraining_beside_a_supervised_task(cohort: Path, tmp_path: Path) -> None:
    both = '{"spheres": {"type": "segmentation", "levels": 1}, "mae": {"type": "masked", "block": (4, 4, 4)}}'
    run = tmp_path / "run"
    file = recipe(tmp_path / "both.py", cohort, both)
    main.main([f"--config={file}", f"--workdir={run}", "--config.optim.accumulate=2", "--config.train.total=2 steps"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if "train/loss" in row)
    assert first["train/loss"] == pytest.approx(first["train/loss/spheres"] + first["train/loss/mae"], rel=1e-5)
    metrics = json.loads((run / "eval" / "test" / "summary.json").read_text())["metrics"]
    assert {"spheres/dice", "mae/error", "mae/explained"} <= set(metrics)
    assert (run / "eval" / "test" / "predictions" / "case7.nii.gz").exists()
