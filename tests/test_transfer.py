"""First weights from elsewhere: names, shapes, refusals; against interpolation and responses worked out apart."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from test_train import load, state_bytes
from untrained import make_run

from medjax import config as config_lib
from medjax import convert, main, models, peft, transfer
from medjax import job as job_lib
from medjax import step as step_lib
from medjax.errors import UserError
from medjax.models import stages
from medjax.models.heads import DenseHead
from medjax.models.model import Model
from medjax.ops.conv3d import conv3d
from medjax.transfer import Source, Target

RNG = np.random.default_rng(0)
STEM, DEEP, HEAD = "backbone/encoder0/block0/conv/kernel", "backbone/encoder1/block0/conv/kernel", "heads_a/level0/bias"
SHAPES = {STEM: (3, 3, 3, 2, 4), DEEP: (3, 3, 3, 4, 8), HEAD: (3,)}
UNET = {"name": "unet", "features": (4, 8), "levels": 0}


def rules(**changes: Any) -> Any:
    init = config_lib.defaults().init
    init.update(changes)
    return init


def source(shapes: Any = SHAPES, **changes: Any) -> Source:
    params = {path: RNG.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}
    return Source(
        **{
            "path": Path("runs/a"),
            "where": "runs/a",
            "params": params,
            "model": UNET,
            "modalities": ("T1", "T2"),
            **changes,
        }
    )


def target(shapes: Any = SHAPES, **changes: Any) -> Target:
    return Target(**{"model": UNET, "shapes": shapes, "stems": {STEM: 3}, "modalities": ("T1", "T2"), **changes})


# --- names -----------------------------------------------------------------------------------------------------------


def test_same_names_are_taken_and_the_table_says_what_was_not() -> None:
    there = source({STEM: SHAPES[STEM], DEEP: SHAPES[DEEP], "heads_masked/out/kernel": (1, 1)})
    done = transfer.match(there, target(), rules())
    assert set(done.params) == {STEM, DEEP}
    assert (done.missing, done.unused) == ([HEAD], ["heads_masked/out/kernel"])
    for path in done.params:
        np.testing.assert_array_equal(done.params[path], there.params[path])
    text = transfer.table(done)
    assert "2 matched, 0 reshaped, 1 missing, 1 unused" in text
    for line in ("matched   backbone/encoder0 (1)", "missing   heads_a/level0 (1)", "unused    heads_masked/out (1)"):
        assert line in text


def test_rules_rename_and_leave_out() -> None:
    there = source({"net/down0/w": SHAPES[STEM], "net/down1/w": SHAPES[DEEP], HEAD: (3,)})
    renames = ((r"net/down(\d)/w", r"backbone/encoder\1/block0/conv/kernel"), (r"heads_.*", ""))
    done = transfer.match(there, target(), rules(rules=renames))
    assert set(done.params) == {STEM, DEEP}
    assert done.unused == [HEAD]
    np.testing.assert_array_equal(done.params[DEEP], there.params["net/down1/w"])


def test_skipped_ones_stay_at_random() -> None:
    done = transfer.match(source(), target(), rules(skip=("heads_.*",)))
    assert done.missing == [HEAD]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rules": (("heads/.*", ""),)}, "init.rules 'heads/.*' matches nothing"),
        ({"rules": ((".*/kernel", "x"),)}, "make both"),
        ({"rules": (("(", "x"),)}, "init.rules"),
        ({"rules": ((".*bias", r"\2"),)}, "init.rules"),
        ({"rules": ("abc",)}, "pairs of texts"),
        ({"skip": ("decoder.*",)}, "init.skip 'decoder.*' matches no parameter; the nearest is"),
        ({"channels": "mean"}, "init.channels 'mean' is not known; known: average, names"),
        ({"kernels": "cubic"}, "init.kernels 'cubic' is not known"),
        ({"skip": (".*encoder.*",)}, "nothing of it fits the encoder"),
    ],
)
def test_rules_that_cannot_be_meant(changes: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        transfer.match(source(), target(), rules(**changes))
    assert words in str(caught.value)


def test_nothing_matched_is_an_error() -> None:
    with pytest.raises(UserError, match="not one of its 1 parameters matches") as caught:
        transfer.match(source({"conv1.weight": (3, 3)}, model={}), target(), rules())
    assert "conv1.weight" in str(caught.value)
    assert STEM in str(caught.value)


def test_another_backbone_is_refused_though_names_fit() -> None:
    """nnU-Net's network and `unet` share the name, and here the shape, of their first convolution."""
    there = source(model={"name": "nnunet"})
    with pytest.raises(UserError, match="its backbone is 'nnunet', this run's is 'unet'"):
        transfer.match(there, target(), rules())
    same = rules(rules=((r"backbone/(.*)", r"backbone/\1"),))
    assert len(transfer.match(there, target(), same).params) == 3, "rules say that it is meant"
    # With a decoder or without is one family.
    vit = {"backbone/encoder/norm/scale": (8,)}
    there = source(vit, model={"name": "vit"}, modalities=())
    assert transfer.match(there, target(vit, model={"name": "unetr"}, stems={}), rules()).params


def test_other_channels_are_refused_by_name_and_size() -> None:
    wide = {**SHAPES, DEEP: (3, 3, 3, 4, 16), HEAD: (5,)}
    with pytest.raises(UserError) as caught:
        transfer.match(source(), target(wide), rules(kernels="trilinear", channels="average"))
    assert "2 parameter(s) do not fit" in str(caught.value)
    assert f"{DEEP}: 3×3×3×4×8 there, 3×3×3×4×16 here" in str(caught.value)
    assert "init.skip" in str(caught.value)


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_averaged_stem_keeps_the_response_to_equal_channels() -> None:
    four = {**SHAPES, STEM: (3, 3, 3, 4, 4)}
    there, here = source(), target(four, modalities=("a", "b", "c", "d"))
    with pytest.raises(UserError, match=r"2 channel\(s\) there, 4 here: init.channels"):
        transfer.match(there, here, rules())
    done = transfer.match(there, here, rules(channels="average"))
    image = RNG.normal(size=(1, 6, 6, 6, 1)).astype(np.float32)
    before = conv3d(jnp.repeat(image, 2, -1), jnp.asarray(there.params[STEM]))
    after = conv3d(jnp.repeat(image, 4, -1), jnp.asarray(done.params[STEM]))
    np.testing.assert_allclose(after, before, atol=1e-4)
    assert "channels averaged" in done.reshaped[STEM]


def test_other_modalities_are_averaged_though_as_many() -> None:
    there = source()
    done = transfer.match(there, target(modalities=("CT", "PET")), rules(channels="average"))
    want = np.repeat(there.params[STEM].sum(3, keepdims=True) / 2, 2, axis=3)
    np.testing.assert_allclose(done.params[STEM], want, rtol=1e-6)
    # Modalities that are the same, or not known, are taken as they are.
    for names in (("T1", "T2"), ()):
        there = source(modalities=names)
        done = transfer.match(there, target(), rules(channels="average"))
        np.testing.assert_array_equal(done.params[STEM], there.params[STEM])
        assert not done.reshaped


def test_named_channels_keep_their_weights_and_new_ones_begin_at_zero() -> None:
    three = {**SHAPES, STEM: (3, 3, 3, 3, 4)}
    there = source()
    done = transfer.match(there, target(three, modalities=("T2", "PD", "T1")), rules(channels="names"))
    old, new = there.params[STEM], done.params[STEM]
    np.testing.assert_array_equal(new[..., 0, :], old[..., 1, :])
    np.testing.assert_array_equal(new[..., 1, :], 0)
    np.testing.assert_array_equal(new[..., 2, :], old[..., 0, :])
    # As many, in another order.
    done = transfer.match(there, target(modalities=("T2", "T1")), rules(channels="names"))
    np.testing.assert_array_equal(done.params[STEM], old[..., ::-1, :])
    with pytest.raises(UserError, match="none is common"):
        transfer.match(there, target(modalities=("CT", "PET")), rules(channels="names"))
    with pytest.raises(UserError, match="names of its modalities are not known"):
        transfer.match(source(modalities=()), target(three), rules(channels="names"))


def test_channels_taken_in_order_are_noted(capsys: pytest.CaptureFixture) -> None:
    transfer.match(source(), target(modalities=("FLAIR", "T1")), rules())
    assert "channels are taken in order: T1, T2 there as FLAIR, T1 here" in capsys.readouterr().err


@pytest.mark.parametrize("new", [(5, 5, 5), (5, 3, 7)])
def test_upkern_is_direct_trilinear_interpolation(new: tuple[int, int, int]) -> None:
    depthwise = {**SHAPES, DEEP: (*new, 1, 8)}
    there = source({**SHAPES, DEEP: (3, 3, 3, 1, 8)})
    with pytest.raises(UserError, match=r"init.kernels='trilinear' enlarges kernels"):
        transfer.match(there, target(depthwise), rules())
    done = transfer.match(there, target(depthwise), rules(kernels="trilinear"))
    # Centres of new cells in the old grid's coordinates; beyond the outermost centre the value stays.
    at = np.meshgrid(*[(np.arange(n) + 0.5) * 3 / n - 0.5 for n in new], indexing="ij")
    for channel in range(8):
        old = there.params[DEEP][..., 0, channel].astype(np.float64)
        want = scipy.ndimage.map_coordinates(old, at, order=1, mode="nearest")
        np.testing.assert_allclose(done.params[DEEP][..., 0, channel], want, atol=1e-6)
    assert "kernel enlarged" in done.reshaped[DEEP]


def test_kernels_are_not_made_smaller_nor_cells_enlarged() -> None:
    for there, here in (((5, 5, 5, 4, 8), (3, 3, 3, 4, 8)), ((2, 2, 2, 4, 8), (4, 4, 4, 4, 8))):
        with pytest.raises(UserError, match="do not fit"):
            transfer.match(source({**SHAPES, DEEP: there}), target({**SHAPES, DEEP: here}), rules(kernels="trilinear"))


@pytest.mark.parametrize("grid", [(6, 4, 8), (2, 2, 4)])
def test_positions_are_interpolated_as_the_network_does(grid: tuple[int, int, int]) -> None:
    path = "backbone/encoder/position"
    there = source({path: (4, 4, 4, 8)}, model={"name": "vit"}, modalities=())
    here = target({path: (*grid, 8)}, model={"name": "vit"}, stems={})
    done = transfer.match(there, here, rules())
    want = jax.image.resize(there.params[path], (*grid, 8), "trilinear")
    np.testing.assert_allclose(done.params[path], want, atol=1e-6)
    with pytest.raises(UserError, match="init.positions='trilinear'"):
        transfer.match(there, here, rules(positions=""))


@pytest.mark.parametrize("grid", [(9, 7, 5), (5, 13, 7)])
def test_offsets_in_windows_are_interpolated_linearly(grid: tuple[int, int, int]) -> None:
    path = "backbone/stage0_block0/bias_table"
    there = source({path: (5, 7, 5, 2)}, model={"name": "swin"}, modalities=())
    here = target({path: (*grid, 2)}, model={"name": "swin"}, stems={})
    done = transfer.match(there, here, rules())
    at = np.meshgrid(*[(np.arange(n) + 0.5) * o / n - 0.5 for o, n in zip((5, 7, 5), grid, strict=True)], indexing="ij")
    for head in range(2):
        old = there.params[path][..., head].astype(np.float64)
        want = scipy.ndimage.map_coordinates(old, at, order=1, mode="nearest")
        np.testing.assert_allclose(done.params[path][..., head], want, atol=1e-6)
    # A token to itself: the middle of both.
    middle = tuple(n // 2 for n in grid)
    np.testing.assert_allclose(done.params[path][middle], there.params[path][2, 3, 2], atol=1e-6)
    assert "interpolated" in done.reshaped[path]
    with pytest.raises(UserError, match="init.positions='trilinear'"):
        transfer.match(there, here, rules(positions=""))


# --- sources ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same(base: Path, tmp_path: Path) -> None:
    run = transfer.read(base, "latest")
    assert (run.kind, run.step, run.modalities, run.model["name"]) == ("latest", 0, ("MRI",), "unet")
    convert.save(tmp_path, run.params, {"model": {"name": "unet"}})
    folders = base / "checkpoints", base / "checkpoints" / "latest", base / "checkpoints" / "latest" / "0"
    for place in (base, *folders, tmp_path, tmp_path / "params.npz"):  # without a best one the latest is taken
        found = transfer.read(place)
        assert found.params.keys() == run.params.keys()
        jax.tree.map(np.testing.assert_array_equal, found.params, run.params)


def test_sources_that_are_none(base: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.pth").write_bytes(b"")
    (tmp_path / "params.npz").write_bytes(b"no archive")
    (tmp_path / "empty").mkdir()
    for place, which, words in (
        (tmp_path / "nothing", "best", "there is no such run"),
        (tmp_path / "weights.pth", "best", "python -m medjax.convert --from="),
        (tmp_path / "params.npz", "best", "is no file of python -m medjax.convert"),
        (tmp_path / "empty", "best", "holds no checkpoint"),
        (base / "checkpoints" / "best", "best", "holds no complete checkpoint"),
        (base, "newest", "init.which 'newest' is not known"),
    ):
        with pytest.raises(UserError, match=words):
            transfer.read(place, which)
    (tmp_path / "run" / "checkpoints" / "latest" / "2").mkdir(parents=True)  # nothing in it
    with pytest.raises(UserError, match="latest/2: the checkpoint is damaged"):
        transfer.read(tmp_path / "run" / "checkpoints" / "latest" / "2")


def first_state(config: Any) -> tuple[Any, Any]:
    job = job_lib.open_job(config)
    start = transfer.open_start(config, job.model, job.plan.modalities, Path())
    _, _, create = step_lib.make_state(config, job)
    state = jax.jit(create)()
    return step_lib.start_from(start, state) if start else state, start


def test_a_run_begins_with_the_averaged_weights_of_another(recipe: Path, base: Path) -> None:
    state, start = first_state(load(recipe, f"init.source={base}"))
    want = transfer.read(base).params
    for tree in (state.params, state.average):
        found = peft.flat(tree)
        assert found.keys() == want.keys()
        jax.tree.map(np.testing.assert_array_equal, {k: np.asarray(v) for k, v in found.items()}, want)
    assert not start.missing
    random, _ = first_state(load(recipe))
    moved = peft.flat(random.params)[STEM]
    assert np.abs(np.asarray(moved) - want[STEM]).max() > 0.1


def test_a_resumed_run_needs_its_source_no_more(recipe: Path, base: Path, tmp_path: Path, capsys: Any) -> None:
    """The whole run, and one that goes on from its middle after the source is gone, end bit-identical."""
    source, whole, again = tmp_path / "source", tmp_path / "whole", tmp_path / "again"
    shutil.copytree(base, source)
    command = [
        f"--config={recipe}", f"--config.init.source={source}", "--config.train.total=4 steps",
        "--config.eval.pictures=false", "--config.eval.predictions=false", "--config.eval.splits=('val',)",
    ]  # fmt: skip
    main.main([*command, f"--workdir={whole}"])
    assert "matched, 0 reshaped, 0 missing, 0 unused" in capsys.readouterr().out
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoints" / "latest" / "4")
    shutil.rmtree(again / "checkpoints" / "best")
    shutil.rmtree(source)
    main.main([*command, f"--workdir={again}"])
    assert "matched" not in capsys.readouterr().out
    assert state_bytes(again) == state_bytes(whole)


@pytest.mark.parametrize(
    ("options", "stems"),
    [
        ({"name": "unet", "features": (4, 8), "convs": 1}, ("encoder0/block0/conv",)),
        (
            {"name": "unetr", "features": 8, "heads": 2, "mlp": 8, "depth": 4, "patch": (8, 8, 8)},
            ("encoder/embed", "image/conv1/conv", "image/shortcut/conv"),
        ),
    ],
)
def test_what_sees_the_image_is_found_in_every_network(options: Any, stems: tuple[str, ...]) -> None:
    config = config_lib.defaults()
    config.update({"model": options, "data": {"patch": (16, 16, 16)}})
    found = transfer.describe(config, Model(models.build(options, jnp.float32), {}), ("T1", "T2"))
    assert found.stems == {f"backbone/{stem}/kernel": 3 for stem in stems}


@pytest.mark.parametrize(
    ("job", "decoded"),
    [
        ({"mae": {"type": "masked"}}, False),
        ({"mae": {"type": "masked", "decoder": "backbone"}}, True),
        ({"mae": {"type": "masked", "method": "simmim"}}, True),
        ({"pairs": {"type": "contrastive"}}, False),
        ({"pairs": {"type": "contrastive", "scope": "local"}}, True),
        ({"mae": {"type": "masked"}, "grade": {"type": "classification", "names": ("a", "b")}}, True),
        ({"spheres": {"type": "segmentation"}}, True),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_decoder_that_never_trained_is_told(job: Any, decoded: bool, tmp_path: Path) -> None:
    config = config_lib.defaults()
    options = {"name": "unet", "features": (4, 8), "convs": 1, "decoder_convs": 1}
    config.update({"model": options, "data": {"patch": (16, 16, 16)}, "peft": {"type": "probe"}})
    config.init.source = str(make_run(tmp_path / "run", job))
    model = Model(models.build(options, jnp.float32), {"organ": DenseHead(3)})
    start = transfer.open_start(config, model, ("MRI",), tmp_path)
    assert start is not None
    shapes = transfer.describe(config, model, ("MRI",)).shapes
    division = peft.divide(config, shapes)
    text = transfer.table(start, division.frozen)
    never = [line for line in text.splitlines() if "never trained there AND FROZEN" in line]
    assert sum("backbone/up0 (2)" in line or "backbone/decoder0" in line for line in never) == 2 * (not decoded)
    assert ("begin from a run that trained it" in text) == (not decoded)
    assert not [line for line in never if "encoder" in line]
    # Where it learns here, it has only begun at random.
    config.peft.train = ("heads", "decoder")
    text = transfer.table(start, peft.divide(config, shapes).frozen)
    assert "AND FROZEN" not in text
    assert ("never trained there" in text) == (not decoded)
    # All of it is still the source's: what refers to it finds it as it was.
    assert set(start.params) == {path for path in shapes if path.startswith("backbone/")}


def test_a_decoder_that_no_task_needs() -> None:
    for sections, decoded in (
        ({"model": {"name": "unet", "bottleneck": True}, "tasks": {"a": {"type": "regression", "levels": 1}}}, False),
        ({"model": {"name": "unet", "bottleneck": True}, "tasks": {"a": {"type": "regression", "levels": 2}}}, True),
        ({"model": {"name": "unet", "bottleneck": False}, "tasks": {"a": {"type": "regression", "levels": 1}}}, True),
        ({"model": {"name": "unetr"}, "tasks": {"a": {"type": "autoregressive"}}}, False),
    ):
        (task,) = sections["tasks"].values()
        assert transfer._decodes(task, sections["model"]) == decoded


# --- depth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path", "place"),
    [
        ("unet", "backbone/encoder2/block0/conv/kernel", ("encoder", 2)),
        ("unet", "backbone/down2_norm/scale", ("encoder", 2)),
        ("unet", "backbone/up1/kernel", ("decoder", 0)),
        ("resenc", "backbone/stem/conv/kernel", ("encoder", 0)),
        ("resenc", "backbone/decoder/up1/kernel", ("decoder", 0)),
        ("resnet", "backbone/layer0_block1/conv1/conv/kernel", ("encoder", 1)),
        ("densenet", "backbone/transition1/kernel", ("encoder", 2)),
        ("inception", "backbone/stem2/conv/kernel", ("encoder", 0)),
        ("mednext", "backbone/down0/expand/kernel", ("encoder", 1)),
        ("vit", "backbone/encoder/position", ("encoder", 0)),
        ("vit", "backbone/encoder/block3/qkv/kernel", ("encoder", 4)),
        ("unetr", "backbone/skip1_up3/kernel", ("decoder", 0)),
        ("swin_unetr", "backbone/merge3/reduce/kernel", ("encoder", 4)),
        ("swin_unetr", "backbone/skip0/conv1/conv/kernel", ("decoder", 0)),
        ("unet", "heads_a/level0/kernel", ("heads", 0)),
    ],
)
def test_places(name: str, path: str, place: tuple[str, int]) -> None:
    assert stages.places(name, [path])[path] == place


def test_the_last_norm_of_a_transformer_is_of_its_last_stage() -> None:
    found = stages.places("vit", ["backbone/encoder/block0/qkv/kernel", "backbone/encoder/norm/scale"])
    assert found["backbone/encoder/norm/scale"] == ("encoder", 1)
    assert stages.stage_count(found) == 2
