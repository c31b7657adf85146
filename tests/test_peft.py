"""Few parameters train: what does, what it computes, what is kept of it; learning by depth."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import layouts
import numpy as np
import optax
import pytest
from test_train import a_batch, load, make, state_bytes
from untrained import labels_of, make_run, run_predict

from medjax import config as config_lib
from medjax import convert, main, merge, models, optim, parallel, peft, predict, report, tasks, train, transfer
from medjax import job as job_lib
from medjax.checkpoint import Checkpoints
from medjax.errors import UserError
from medjax.models.adapters import Insert
from medjax.models.attention import TransformerBlock
from medjax.models.layers import Conv3D, ConvTranspose3D, PatchConvTranspose
from medjax.models.model import Model, build_model
from medjax.models.vit import ViT
from medjax.ops.conv3d import conv3d

RNG = np.random.default_rng(0)
SHAPES = {
    "backbone/encoder0/block0/conv/kernel": (3, 3, 3, 1, 16),
    "backbone/encoder0/block0/norm/scale": (16,),
    "backbone/encoder0/block0/norm/bias": (16,),
    "backbone/encoder1/block0/conv/kernel": (3, 3, 3, 16, 32),
    "backbone/up0/kernel": (2, 2, 2, 32, 16),
    "backbone/up0/bias": (16,),
    "heads_a/level0/kernel": (1, 1, 1, 16, 3),
    "heads_a/level0/bias": (3,),
}
HEADS = {"heads_a/level0/kernel", "heads_a/level0/bias"}


def settings(**changes: Any) -> Any:
    config = config_lib.defaults()
    with config.ignore_type():
        config.update_from_flattened_dict({k.replace("__", "."): v for k, v in changes.items()})
    return config


# --- what trains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "trained"),
    [
        ("probe", set()),
        ("bitfit", {"backbone/encoder0/block0/norm/bias", "backbone/up0/bias"}),
        ("norm", {"backbone/encoder0/block0/norm/scale", "backbone/encoder0/block0/norm/bias"}),
    ],
)
def test_types_that_train_parameters_as_they_are(kind: str, trained: set[str]) -> None:
    division = peft.divide(settings(peft__type=kind), SHAPES)
    assert division.trained == trained | HEADS
    assert not division.factors


def test_everything_trains_unless_a_rule_freezes_it() -> None:
    assert peft.divide(settings(), SHAPES).whole
    frozen = settings(optim__rules=((r"backbone/encoder.*", {"lr": 0.0}), (".*", {})))
    assert peft.divide(frozen, SHAPES).frozen == {path for path in SHAPES if "encoder" in path}
    with pytest.raises(UserError, match="no parameter trains"):
        peft.divide(settings(optim__rules=((".*", {"lr": 0.0}),)), SHAPES)


def test_parts_of_the_network_train_besides() -> None:
    both = peft.divide(settings(peft__type="probe", peft__train=("heads", "decoder")), SHAPES)
    assert both.trained == HEADS | {"backbone/up0/kernel", "backbone/up0/bias"}
    some = peft.divide(settings(peft__type="probe", peft__train=(r".*/norm/.*",)), SHAPES)
    assert some.trained == {path for path in SHAPES if "/norm/" in path}


def test_stored_statistics_never_train() -> None:
    shapes = {**SHAPES, **{f"backbone/encoder0/block0/norm/{leaf}": (16,) for leaf in ("mean", "variance")}}
    rules = ((r".*", {"decay": 1.0}),)
    for config in (settings(optim__rules=rules), settings(peft__type="probe", peft__train=(".*",))):
        division = peft.divide(config, shapes)
        assert division.frozen == set(shapes) - set(SHAPES)
    # A parameter of that name alone is none.
    assert peft.divide(settings(), {**SHAPES, "backbone/mean": (3,)}).whole


def test_what_has_no_use_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("medjax.errors._said", set())  # another test may have said it
    for changes, words in (
        ({"peft__targets": ("backbone/up0/kernel",)}, "peft.type is empty, so everything trains"),
        ({"peft__type": "norm"}, "peft.type 'norm' without init.source"),
        ({"peft__type": "norm", "init__source": "runs/x"}, ""),
        ({}, ""),
    ):
        peft.divide(settings(**changes), SHAPES)
        said = capsys.readouterr().err
        assert words in said
        assert bool(said) == bool(words)


def test_low_rank_factors_and_their_share_by_hand() -> None:
    division = peft.divide(settings(peft__type="lora", peft__rank=2), SHAPES)
    stem, deep, up = (path for path in SHAPES if path.startswith("backbone") and path.endswith("kernel"))
    assert division.trained == HEADS
    # Taps with the side of fewer channels.
    assert division.factors[stem] == ((27, 2), (2, 16))
    assert division.factors[deep] == ((27 * 16, 2), (2, 32))
    assert division.factors[up] == ((32, 2), (2, 8 * 16))
    count = 2 * (27 + 16) + 2 * (27 * 16 + 32) + 2 * (32 + 128) + 48 + 3
    total = sum(math.prod(shape) for shape in SHAPES.values())
    assert division.describe().startswith(f"{count:,} of {total:,} parameters ({100 * count / total:.2g} %): lora of 3")


def test_a_kernel_smaller_than_its_factors_trains_in_full() -> None:
    division = peft.divide(settings(peft__type="lora", peft__rank=12), SHAPES)
    stem = "backbone/encoder0/block0/conv/kernel"
    assert math.prod(SHAPES[stem]) < 12 * (27 + 16)
    assert stem in division.trained
    assert stem not in division.factors


@pytest.mark.parametrize("rule", [r"backbone/encoder0/.*/kernel", r"backbone/encoder0/.*", r".*encoder0.*_lora_."])
def test_a_kernel_that_a_rule_freezes_has_no_factors(rule: str) -> None:
    config = settings(peft__type="lora", peft__rank=2, optim__rules=((rule, {"lr": 0.0}), (".*", {})))
    division = peft.divide(config, SHAPES)
    stem = "backbone/encoder0/block0/conv/kernel"
    assert set(division.factors) == {p for p in SHAPES if p.startswith("backbone") and p.endswith("/kernel")} - {stem}
    assert stem in division.frozen
    # What is learnt covers the same rules.
    params = division.split(peft.nest({p: jnp.zeros(s) for p, s in SHAPES.items()}), jax.random.key(0))[0]
    optim.build(config.optim, params, 10, known=division.everything(), factors=division.bases)


def test_factors_learn_at_the_rate_of_their_kernel() -> None:
    rules = ((r".*encoder0/.*/kernel", {"lr": 0.1}), (r".*", {"decay": 0.0}))
    config = settings(
        peft__type="lora", peft__rank=2, optim__rules=rules, optim__clip=0.0, optim__momentum=0.0,
        optim__layer_decay=0.5, model__name="unet",
    )  # fmt: skip
    division = peft.divide(config, SHAPES)
    scales, _ = peft.by_depth(config, division, lambda text, key: 0)
    params = division.split(peft.nest({p: jnp.ones(s) for p, s in SHAPES.items()}), jax.random.key(0))[0]
    tx, rate = optim.build(config.optim, params, 10, known=division.everything(), scales=scales, factors=division.bases)
    ones = jax.tree.map(jnp.ones_like, params)
    moved = peft.flat(tx.update(ones, tx.init(params), params)[0])
    for path, factor in (("encoder0/block0/conv", 0.1 * 0.25), ("encoder1/block0/conv", 0.5), ("up0", 1.0)):
        for part in ("a", "b"):
            np.testing.assert_allclose(moved[f"backbone/{path}/kernel_lora_{part}"], -factor * rate(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft__type": "dora"}, "peft.type 'dora' is not known; known: lora, adapter"),
        ({"peft__type": "lora", "peft__targets": (".*/qkv/kernel",)}, "peft.targets '.*/qkv/kernel' matches no kernel"),
        ({"peft__type": "lora", "peft__targets": (".*/norm/scale",)}, "matches no kernel of a dense or convolutional"),
        ({"peft__type": "lora", "peft__targets": ("(",)}, "is no regular expression"),
        ({"peft__type": "lora", "peft__rank": 0}, "must be at least 1"),
        ({"peft__type": "lora", "peft__alpha": 0.0}, "peft.alpha=0.0 must be above 0"),
        ({"peft__type": "probe", "peft__train": ("head",)}, "peft.train 'head' matches no parameter"),
        ({"peft__type": "prompt"}, "finds nothing to train"),
        ({"peft__type": "bitfit", "peft__targets": (".*",)}, "peft.targets are of lora, adapter and prompt"),
        ({"peft__type": "lora", "peft__targets": (5,)}, "peft.targets 5 is no regular expression"),
        ({"peft__type": "probe", "peft__train": ("(",)}, "peft.train '(' is no regular expression"),
        ({"optim__rules": (("(bad", {"lr": 0.0}), (".*", {}))}, "optim.rules '(bad' is no regular expression"),
        ({"optim__rules": (("bad", 0.0), (".*", {}))}, "optim.rules are pairs (regex, {'lr': factor"),
        ({"optim__rules": (".*",)}, "optim.rules are pairs"),
    ],
)
def test_what_cannot_be_meant(changes: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        peft.divide(settings(**changes), SHAPES)
    assert words in str(caught.value)


# --- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("inputs", "outputs"), [(3, 5), (5, 3), (4, 4)])
def test_the_change_of_a_kernel_is_two_convolutions(inputs: int, outputs: int) -> None:
    shape, rank = (3, 3, 3, inputs, outputs), 2
    factors = peft._factors(shape, rank)
    a, b = (RNG.normal(size=s).astype(np.float32) for s in factors)
    kernel = RNG.normal(size=shape).astype(np.float32)
    x = jnp.asarray(RNG.normal(size=(1, 5, 6, 4, inputs)), jnp.float32)
    tree = {"k": {"kernel_lora_a": a, "kernel_lora_b": b}}
    still = {"k": {"kernel": kernel, "kernel_lora_scale": np.float32(0.5)}}
    got = conv3d(x, peft.combine(tree, still)["k"]["kernel"])
    if inputs <= outputs:  # a convolution to `rank` channels, then a map
        low = conv3d(x, jnp.asarray(a.reshape(3, 3, 3, inputs, rank)))
        more = low @ b
    else:  # a map to `rank` channels, then a convolution
        more = conv3d(x @ a, jnp.asarray(b.reshape(rank, 3, 3, 3, outputs).transpose(1, 2, 3, 0, 4)))
    np.testing.assert_allclose(got, conv3d(x, jnp.asarray(kernel)) + 0.5 * more, atol=1e-4)


def _strided(x: Any, a: Any, b: Any) -> Any:
    return Conv3D(2, strides=(2, 2, 1), use_bias=False).apply(_kernel(a.reshape(3, 3, 3, 3, 2)), x) @ b


def _strided_down(x: Any, a: Any, b: Any) -> Any:
    kernel = b.reshape(2, 3, 3, 3, 2).transpose(1, 2, 3, 0, 4)
    return Conv3D(2, strides=(2, 2, 1), use_bias=False).apply(_kernel(kernel), x @ a)


def _cells_up(x: Any, a: Any, b: Any) -> Any:
    kernel = b.reshape(2, 2, 2, 2, 2).transpose(1, 2, 3, 0, 4)
    return PatchConvTranspose(2, use_bias=False).apply(_kernel(kernel), x @ a)


def _transposed(x: Any, a: Any, b: Any) -> Any:
    # The adjoint of the convolution by a and the map b is that of the map, then that of the convolution.
    return ConvTranspose3D(2).apply({"params": {"kernel": a.reshape(3, 3, 3, 2, 2), "bias": np.zeros(2)}}, x @ b.T)


def _depthwise(x: Any, a: Any, b: Any) -> Any:
    # Every channel by the same `rank` filters, of which it takes its own mixture.
    low = [Conv3D(2, use_bias=False).apply(_kernel(a.reshape(3, 3, 3, 1, 2)), x[..., c : c + 1]) for c in range(3)]
    return jnp.stack([low[c] @ b[:, c] for c in range(3)], axis=-1)


def _kernel(array: Any) -> Any:
    return {"params": {"kernel": jnp.asarray(array)}}


@pytest.mark.parametrize(
    ("layer", "channels", "apart"),
    [
        (Conv3D(4, strides=(2, 2, 1), use_bias=False), 3, _strided),
        (Conv3D(2, strides=(2, 2, 1), use_bias=False), 3, _strided_down),
        (PatchConvTranspose(2, use_bias=False), 3, _cells_up),
        (ConvTranspose3D(2), 3, _transposed),
        (Conv3D(3, groups=3, use_bias=False), 3, _depthwise),
    ],
    ids=lambda value: value.__name__.lstrip("_") if callable(value) and hasattr(value, "__name__") else "",
)
def test_a_merged_kernel_is_its_factors_beside_the_layer(layer: Any, channels: int, apart: Any) -> None:
    x = jnp.asarray(RNG.normal(size=(1, 5, 4, 3, channels)), jnp.float32)
    params = layer.init(jax.random.key(0), x)["params"]
    a, b = (RNG.normal(size=s).astype(np.float32) for s in peft._factors(params["kernel"].shape, 2))
    still = {"m": {**params, "kernel_lora_scale": np.float32(0.5)}}
    merged = peft.combine({"m": {"kernel_lora_a": a, "kernel_lora_b": b}}, still)["m"]
    want = layer.apply({"params": params}, x) + 0.5 * apart(x, a, b)
    np.testing.assert_allclose(layer.apply({"params": merged}, x), want, atol=1e-4)


def test_nothing_is_computed_where_everything_trains() -> None:
    tree = {"a": {"kernel": np.ones(3)}}
    assert peft.combine(tree, None, None) is tree


def test_split_and_combine_are_inverse_and_begin_as_the_network_was() -> None:
    params = peft.nest({path: jnp.asarray(RNG.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()})
    division = peft.divide(settings(peft__type="lora"), SHAPES).referring(["backbone/up0/bias", "heads_a/level0/bias"])
    parts = division.split(params, jax.random.key(0))
    assert set(peft.flat(parts[2])) == {"backbone/up0/bias"}, "what trains is never referred to"
    whole = peft.combine(*parts)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, whole, params)


VIT = {"features": 8, "depth": 2, "heads": 2, "mlp": 16, "patch": (4, 4, 4)}


def test_adapters_begin_as_the_identity_in_every_block() -> None:
    x = jnp.asarray(RNG.normal(size=(2, 8, 8, 8, 1)), jnp.float32)
    unet = {"features": (4, 8), "convs": 1, "decoder_convs": 1}
    for name, options, blocks in (
        ("unet", unet, ("encoder0/block0", "encoder1/block0", "decoder0/block0")),
        ("vit", {**VIT, "remat": True}, ("encoder/block0", "encoder/block1")),
    ):
        backbone = models.build({"name": name, **options}, jnp.float32)
        model = Model(backbone, {}, Insert("adapter", 3))
        params = jax.jit(lambda: model.init(jax.random.key(0), x, train=True)["params"])()
        found = {path.split("/adapter")[0] for path in peft.flat(params) if "/adapter/" in path}
        assert found == {f"backbone/{block}" for block in blocks}
        inside = lambda m: jax.jit(lambda p: m.apply({"params": p}, x, method=lambda m, x: m.backbone(x)))(params)  # noqa: E731
        with_them = jax.jit(lambda p: model.apply({"params": p}, x, method=_pyramid))(params)
        jax.tree.map(np.testing.assert_array_equal, with_them, inside(model))


def _pyramid(model: Any, x: Any) -> Any:
    return model.insert.call(model.backbone, x)


def test_prompt_tokens_are_seen_and_dropped_by_every_block() -> None:
    x = jnp.asarray(RNG.normal(size=(2, 8, 8, 8, 1)), jnp.float32)
    model = Model(ViT(**VIT), {}, Insert("prompt", 3))
    params = model.init(jax.random.key(0), x, train=True)["params"]
    assert params["backbone"]["encoder"]["block1"]["prompt"].shape == (3, 8)
    got = model.apply({"params": params}, x, method=_pyramid)[0]

    encoder = params["backbone"]["encoder"]
    cells = x.reshape(2, 2, 4, 2, 4, 2, 4, 1).transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(2, 8, 64)
    tokens = cells @ encoder["embed"]["kernel"].reshape(64, 8) + encoder["embed"]["bias"]
    tokens += encoder["position"].reshape(8, 8)
    for i in range(2):
        own = dict(encoder[f"block{i}"])
        prompt = jnp.broadcast_to(own.pop("prompt"), (2, 3, 8))
        block = TransformerBlock(2, 16, False, 0.0, 0.0, False, jnp.float32)
        tokens = block.apply({"params": own}, jnp.concatenate([prompt, tokens], axis=1))[:, 3:]
    centre = tokens - tokens.mean(-1, keepdims=True)
    norm = encoder["norm"]
    want = centre / jnp.sqrt(jnp.square(centre).mean(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(got.reshape(2, 8, 8), want, atol=1e-4)


def test_prompts_and_adapters_that_find_no_block() -> None:
    x = jnp.zeros((1, 8, 8, 8, 1))
    unet = models.build({"name": "unet", "features": (4, 8)}, jnp.float32)
    with pytest.raises(UserError, match="peft.type finds no transformer block"):
        jax.eval_shape(Model(unet, {}, Insert("prompt", 3)).init, jax.random.key(0), x)
    with pytest.raises(UserError, match="peft.targets 'backbone/stage.*' matches no block"):
        jax.eval_shape(Model(unet, {}, Insert("adapter", 3, ("backbone/stage.*",))).init, jax.random.key(0), x)
    with pytest.raises(UserError, match=r"'backbone.\*' takes the module 'backbone', which makes no single array"):
        jax.eval_shape(Model(unet, {}, Insert("adapter", 3, ("backbone.*",))).init, jax.random.key(0), x)
    for kind in ("adapter", "prompt"):
        with pytest.raises(UserError, match=r"peft.targets 'backbone/\(enc' is no regular expression"):
            Insert(kind, 2, ("backbone/(enc",))


def test_nothing_is_inserted_where_it_would_not_train() -> None:
    """A self-supervised task's own pass goes past adapters and prompts."""
    config = settings(peft__type="adapter", model__name="unet")
    both = tasks.build({"mae": {"type": "masked"}, "organ": {"type": "segmentation"}}, {"organ": 1})
    with pytest.raises(UserError, match="peft.type 'adapter': task 'mae' is self-supervised"):
        build_model(config, both)
    build_model(settings(peft__type="lora", model__name="unet"), both)


# --- training --------------------------------------------------------------------------------------------------------


def test_only_what_trains_changes_and_has_moments(recipe: Path) -> None:
    step, create, mesh = make(
        load(recipe, "peft.type=lora", "peft.rank=1", "optim.rules=(('.*up0.*',{'lr':0.}),('.*',{}))")
    )
    state = jax.jit(create)()
    before = jax.device_get(state)
    for seed in range(2):
        state, sums = step(state, parallel.put_batch(a_batch(seed=seed), mesh))
    jax.tree.map(np.testing.assert_array_equal, before.frozen, jax.device_get(state.frozen))
    trained = peft.flat(state.params)
    assert {path.rsplit("/", 1)[1] for path in trained if path.startswith("backbone")} == {
        "kernel_lora_a",
        "kernel_lora_b",
    }
    assert not any("up0" in path for path in trained), "a rule froze it"
    for path, leaf in peft.flat(before.params).items():
        moved = np.abs(np.asarray(trained[path]) - leaf).max()
        assert moved > 0, path
    # Adam's two moments of what trains, and its count.
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert sizes == sorted(2 * [leaf.size for leaf in trained.values()])
    assert np.isfinite(float(sums["loss"]))
    # The average evaluates as a network of its own.
    assert jax.tree.structure(state.eval_params) == jax.tree.structure(jax.eval_shape(make(load(recipe))[1]).params)


@pytest.mark.parametrize("method", ["mean_teacher", "cps"])
def test_it_goes_with_learning_from_unlabelled_cases(recipe: Path, method: str) -> None:
    """Teachers and second networks are changes of the same base."""
    config = load(recipe, "peft.type=lora", f"semi.method={method}", "data.labelled=3")
    step, create, _ = make(config)
    state = jax.eval_shape(create)
    after, sums = step.trace(state, a_batch()).out_info
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert "loss" in sums
    other = state.average if method == "mean_teacher" else state.twin[0]
    assert jax.tree.structure(other) == jax.tree.structure(state.params)


def test_a_frozen_backbone_costs_no_backward(recipe: Path) -> None:
    def flops(*more: str) -> int:
        step, create, _ = make(load(recipe, *more))
        return report.flops(step.trace(jax.eval_shape(create), a_batch()).jaxpr)

    whole, probe = flops(), flops("peft.type=probe")
    forward = report.flops(
        jax.make_jaxpr(lambda s: job_model(recipe).apply({"params": s}, a_batch()["image"], train=True))(
            jax.eval_shape(make(load(recipe))[1]).params
        )
    )
    assert whole > 2.5 * forward
    assert probe < 1.1 * forward


def job_model(recipe: Path) -> Any:
    return job_lib.open_job(load(recipe)).model


@pytest.fixture(scope="module")
def tuned(recipe: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, Path]:
    """(command, base, run folder) of a run of low rank."""
    folder = tmp_path_factory.mktemp("tuned")
    shutil.copytree(base, folder / "base")
    command = [
        f"--config={recipe}", f"--config.init.source={folder / 'base'}", "--config.peft.type=lora",
        "--config.peft.rank=1", "--config.peft.alpha=2", "--config.optim.lr=0.1", "--config.train.total=4 steps",
        "--config.optim.schedule=constant", "--config.eval.pictures=false", "--config.eval.predictions=false",
        "--config.eval.splits=('val',)",
    ]  # fmt: skip
    main.main([*command, f"--workdir={folder / 'run'}"])
    return command, folder / "base", folder / "run"


def test_a_checkpoint_holds_the_change_alone(tuned: Any) -> None:
    _, source, run = tuned
    checkpoints = Checkpoints(run, read_only=True)
    trained, frozen = checkpoints.parameters("latest", 4)
    meta = checkpoints.meta("latest", 4)
    stored = peft.flat(checkpoints._stored("latest", 4))
    checkpoints.close()
    known = transfer.read(source).params
    assert set(peft.flat(trained)) & set(known) == {path for path in known if path.startswith("heads_")}
    assert {path.rsplit("_", 1)[1] for path in peft.flat(frozen)} == {"scale"}, (
        "what they count, and nothing of the base"
    )
    assert not any(path.startswith("base") for path in stored)
    assert meta["base"]["step"] == 0
    assert (run / meta["base"]["beside"]).resolve() == source


def unmerged(params: dict[str, np.ndarray], factors: Any, x: Any, model: Any) -> Any:
    """The network with the factors beside its convolutions, not within them."""

    def beside(function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = function(*args, **kwargs)
        name = "/".join(context.module.path) + "/kernel"
        if isinstance(context.module, Conv3D) and name + "_lora_a" in factors:
            a, b = (factors[name + part] for part in ("_lora_a", "_lora_b"))
            *taps, inputs, outputs = params[name].shape
            rank = a.shape[1]
            if len(a) == inputs:
                kernel = b.reshape(rank, *taps, outputs).transpose(1, 2, 3, 0, 4)
                y = y + 2.0 * conv3d(args[0] @ a, jnp.asarray(kernel))
            else:
                y = y + 2.0 * conv3d(args[0], jnp.asarray(a.reshape(*taps, inputs, rank))) @ b
        return y

    with nn.intercept_methods(beside):
        return model.apply({"params": peft.nest(params)}, x)


def test_merged_for_inference_the_output_is_the_same(tuned: Any) -> None:
    """The run as it predicts, against the base with the trained factors beside its convolutions."""
    _, source, folder = tuned
    run = predict.Run(folder, kind="latest")
    checkpoints = Checkpoints(folder, read_only=True)
    trained = peft.flat(checkpoints.parameters("latest", 4)[0])
    checkpoints.close()
    x = jnp.asarray(RNG.normal(size=(1, 16, 16, 16, 1)), jnp.float32)
    merged = run.model.apply({"params": run.params}, x)["spheres"][0]
    own = {path: array for path, array in trained.items() if "_lora_" not in path}
    whole = transfer.read(source).params | own
    # Maps over cells are no Conv3D: their change is put in here.
    for path in [p.removesuffix("_lora_a") for p in trained if p.endswith("_lora_a") and ("up" in p or "down" in p)]:
        a, b = trained[path + "_lora_a"], trained[path + "_lora_b"]
        whole[path] = whole[path] + 2.0 * np.asarray(peft.change(a, b, whole[path].shape))
    apart = unmerged(whole, trained, x, run.model)["spheres"][0]
    scale = float(jnp.abs(merged).max())
    np.testing.assert_allclose(merged / scale, apart / scale, atol=1e-5)
    plain = run.model.apply({"params": peft.nest(transfer.read(source).params)}, x)["spheres"][0]
    assert float(jnp.abs(plain - merged).max()) > 1e-2 * scale, "it has learnt something"


def test_resumed_it_ends_bit_identical(tuned: Any, tmp_path: Path) -> None:
    command, _, run = tuned
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "latest" / "4")
    shutil.rmtree(again / "checkpoints" / "best")
    main.main([*command, f"--workdir={again}"])
    assert state_bytes(again) == state_bytes(run)


def test_the_base_is_looked_for_and_must_be_what_it_was(tuned: Any, tmp_path: Path, capsys: Any) -> None:
    _, source, run = tuned
    want = predict.Run(run, kind="latest").params
    # Both moved together.
    shutil.copytree(source, tmp_path / "base")
    shutil.copytree(run, tmp_path / "run")
    away = source.with_name("away")
    source.rename(away)
    try:
        found = predict.Run(tmp_path / "run", kind="latest").params
        jax.tree.map(np.testing.assert_array_equal, found, want)
        # Another that has taken its place is passed over.
        make_run(source, seed=4)
        found = predict.Run(tmp_path / "run", kind="latest").params
        jax.tree.map(np.testing.assert_array_equal, found, want)
        shutil.rmtree(tmp_path / "base")
        with pytest.raises(
            UserError, match=r"which is not found as it was:(.|\n)*base: is not there\n.*has other weights"
        ):
            predict.Run(tmp_path / "run", kind="latest")
        shutil.rmtree(source)
        with pytest.raises(UserError, match=r"--base=FOLDER"):
            predict.Run(tmp_path / "run", kind="latest")
        found = predict.Run(tmp_path / "run", kind="latest", base=str(away)).params
        jax.tree.map(np.testing.assert_array_equal, found, want)
        predict.Run(away, base=str(run))
        assert "holds all of its parameters" in capsys.readouterr().err
    finally:
        away.rename(source)


def test_what_neither_the_run_nor_its_base_has_is_named(tmp_path: Path) -> None:
    known = {"a/kernel": np.ones(3, np.float32)}
    start = transfer.Start(transfer.Source(tmp_path, "base", known, {}), known)
    reference = {"source": "base", "sha256": peft.digest(known, known)}
    start.verify(reference, known, tmp_path)
    with pytest.raises(UserError, match=r"neither this nor .* has: a/mean, a/variance; a key of model"):
        start.verify(reference, [*known, "a/mean", "a/variance"], tmp_path)


def test_a_moved_base_is_named_in_every_command(tuned: Any, recipe: Path, tmp_path: Path) -> None:
    """A run that was interrupted and goes on, its evaluation, prediction; and what it saves says where the base is."""
    command, source, run = tuned
    again, away = tmp_path / "again", tmp_path / "away"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "latest" / "4")
    source.rename(away)
    try:
        command = [*command, f"--config.init.source={away}"]
        train.train(load(recipe, *(a.removeprefix("--config.") for a in command[1:])), again)
        assert state_bytes(again) == state_bytes(run)
        checkpoints = Checkpoints(again, read_only=True)
        assert (again / checkpoints.meta("latest", 4)["base"]["beside"]).resolve() == away
        checkpoints.close()
        shutil.copytree(run, tmp_path / "eval")
        main.main([*command, f"--workdir={tmp_path / 'eval'}", "--mode=eval"])
        image = next((recipe.parent / "cohort").rglob("*.nii.gz"))
        predict.main(
            [f"--run={tmp_path / 'eval'}", f"--input={image}", f"--output={tmp_path / 'out'}", f"--base={away}"]
        )
        assert list((tmp_path / "out").glob("*.nii.gz"))
    finally:
        away.rename(source)


def test_a_run_may_begin_from_a_change(tuned: Any) -> None:
    _, _, run = tuned
    found = transfer.read(run, "latest").params
    whole = peft.flat(predict.Run(run, kind="latest").params)
    assert found.keys() == whole.keys()
    for path, array in found.items():
        np.testing.assert_array_equal(array, whole[path])


def test_merged_it_needs_nothing_beside_it(tuned: Any, recipe: Path, tmp_path: Path, capsys: Any) -> None:
    _, source, run = tuned
    merge.main([f"--run={run}", f"--to={tmp_path / 'whole'}"])
    image = next((recipe.parent / "cohort").rglob("*.nii.gz"))
    run_predict(run, image, tmp_path / "before")
    source.rename(source.with_name("away"))
    try:
        run_predict(tmp_path / "whole", image, tmp_path / "after")
        found, merged = transfer.read(tmp_path / "whole"), predict.Run(tmp_path / "whole")
    finally:
        source.with_name("away").rename(source)
    files = [next((tmp_path / name).glob("*.nii.gz")) for name in ("before", "after")]
    np.testing.assert_array_equal(*map(labels_of, files))
    want = predict.Run(run)
    assert merged.step == want.step
    jax.tree.map(np.testing.assert_array_equal, merged.params, want.params)
    assert found.params.keys() == peft.flat(want.params).keys()
    with pytest.raises(UserError, match="merged by medjax.merge, and no training that could go on"):
        main.main([f"--config={recipe}", f"--workdir={tmp_path / 'whole'}"])
    for kept, to, words in (
        (run, "whole", "is not empty"),
        (run, "whole/config.json", "is a file"),
        (tmp_path / "whole", "more", "holds all of its parameters already"),
    ):
        with pytest.raises(UserError, match=words):
            merge.main([f"--run={kept}", f"--to={tmp_path / to}"])
    assert not (tmp_path / "more").exists()


@pytest.fixture(scope="module")
def vit(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(recipe, converted weights) of a small transformer that tells a number of each case of `recipe`'s cohort."""
    folder, cohort = tmp_path_factory.mktemp("vit"), recipe.parent / "cohort"
    lines = (cohort / "split.csv").read_text().split()
    table = [f"{lines[0]},image,age"]
    for i, line in enumerate(lines[1:]):
        table.append(f"{line},{cohort / 'imagesTr' / line.partition(',')[0]}.nii.gz,{40 + i}")
    (folder / "cases.csv").write_text("\n".join(table) + "\n")
    options: dict[str, Any] = {"name": "vit", **VIT, "patch": (8, 8, 8)}
    text = recipe.read_text()
    for known, mine in (
        ('{"name": "unet", "features": (4, 8), "convs": 1, "decoder_convs": 1}', repr(options)),
        ('{"spheres": {"type": "segmentation", "levels": 1}}', '{"age": {"type": "regression"}}'),
        (
            f"{str(cohort)!r}",
            f'{str(folder / "cases.csv")!r}, "images": {{"T1": "image"}}, "targets": {{"age": "age"}}',
        ),
        ('{"file": "split.csv"}', '{"column": "split"}'),
    ):
        assert text.count(known) == 1
        text = text.replace(known, mine)
    (folder / "vit.py").write_text(text)
    model = job_model(folder / "vit.py")
    like = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 16, 1)), train=True)["params"])
    params = {path: RNG.normal(0, 0.3, leaf.shape).astype(np.float32) for path, leaf in peft.flat(like).items()}
    convert.save(folder / "base", params, {"model": options})
    return folder / "vit.py", folder / "base"


def fine_tuned(recipe: Path, source: Path, run: Path, kind: str, *more: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two steps of `peft.type` in the folder `run`; what its checkpoint holds: (trained, frozen), path -> array."""
    given = (
        f"init.source={source}", f"peft.type={kind}", "peft.rank=2", "peft.tokens=3", "optim.lr=0.05", "optim.ema=0.0",
        "optim.schedule=constant", "train.total=2 steps", "train.eval_every=2 steps", "eval.pictures=false",
        "eval.predictions=false", "eval.splits=('val',)", *more,
    )  # fmt: skip
    main.main([f"--config={recipe}", f"--workdir={run}", *(f"--config.{text}" for text in given)])
    checkpoints = Checkpoints(run, read_only=True)
    trained, frozen = map(peft.flat, checkpoints.parameters("latest", 2))
    checkpoints.close()
    return trained, frozen


@pytest.mark.parametrize("kind", ["adapter", "bitfit", "norm", "prompt"])
def test_what_a_type_trains_is_kept_and_stays_in_a_merged_network(
    recipe: Path, base: Path, vit: Any, tmp_path: Path, kind: str
) -> None:
    file, source = vit if kind == "prompt" else (recipe, base)
    trained, frozen = fine_tuned(file, source, tmp_path / "run", kind)
    known = transfer.read(source).params
    own = {path for path in trained if path.startswith("backbone/")}
    assert own
    assert not frozen, "the base has it"
    mine = {
        "adapter": lambda path: "/adapter/" in path,
        "prompt": lambda path: path.endswith("/prompt"),
        "bitfit": lambda path: path.endswith("/bias"),
        "norm": lambda path: "norm/" in path,
    }[kind]
    # All of that kind there is, and nothing of another.
    assert all(map(mine, own))
    assert {path for path in known if path.startswith("backbone/") and mine(path)} <= own
    assert bool(own - set(known)) == (kind in ("adapter", "prompt"))

    merge.main([f"--run={tmp_path / 'run'}", f"--to={tmp_path / 'whole'}"])
    found, merged = (peft.flat(predict.Run(tmp_path / name).params) for name in ("run", "whole"))
    assert found.keys() == set(known) | own
    for path, array in found.items():
        np.testing.assert_array_equal(array, trained[path] if path in trained else known[path])
        np.testing.assert_array_equal(array, merged[path])
    if kind in ("bitfit", "norm"):
        assert all(np.abs(np.asarray(found[path]) - known[path]).max() > 1e-3 for path in own)
    if kind == "adapter":  # they began as the identity
        assert all(np.asarray(found[path]).any() for path in own if path.endswith("/up/kernel"))


def test_dense_layers_of_low_rank_by_hand(vit: Any, tmp_path: Path) -> None:
    """The trained factors beside each dense layer of a transformer; as it predicts, reloaded, and merged."""
    file, source = vit
    trained, _ = fine_tuned(file, source, tmp_path / "run", "lora", "peft.alpha=6")
    known = transfer.read(source).params
    dense = {path for path in known if path.startswith("backbone/") and known[path].ndim == 2 and "kernel" in path}
    assert {path.split("/", 3)[3] for path in dense} == {
        "qkv/kernel", "proj/kernel", "mlp/linear1/kernel", "mlp/linear2/kernel",
    }  # fmt: skip
    assert len(dense) == 8
    assert {path + part for path in dense for part in ("_lora_a", "_lora_b")} <= set(trained)
    whole = known | {path: array for path, array in trained.items() if "_lora_" not in path}
    # Convolutions have a test of their own: their change is put in here.
    for path in {p.rpartition("_lora_")[0] for p in trained if "_lora_" in p} - dense:
        change = peft.change(trained[path + "_lora_a"], trained[path + "_lora_b"], whole[path].shape)
        whole[path] = whole[path] + 3.0 * np.asarray(change)
    seen = []

    def beside(function: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y = function(*args, **kwargs)
        path = "/".join(context.module.path) + "/kernel"
        if context.method_name == "__call__" and path in dense:
            seen.append(path)
            y = y + 3.0 * ((args[0] @ trained[path + "_lora_a"]) @ trained[path + "_lora_b"])
        return y

    run = predict.Run(tmp_path / "run", kind="latest")
    x = jnp.asarray(RNG.normal(size=(1, 16, 16, 16, 1)), jnp.float32)
    says = jax.jit(lambda params: run.model.apply({"params": params}, x)["age"][0])
    with nn.intercept_methods(beside):
        apart = jax.jit(lambda params: run.model.apply({"params": params}, x)["age"][0])(peft.nest(whole))
    assert set(seen) == dense
    found, scale = says(run.params), float(jnp.abs(apart).max())
    np.testing.assert_allclose(found / scale, apart / scale, atol=1e-5)
    assert float(jnp.abs(says(peft.nest(whole)) - apart).max()) > 1e-2 * scale, "they have learnt something"
    merge.main([f"--run={tmp_path / 'run'}", f"--to={tmp_path / 'whole'}"])
    np.testing.assert_array_equal(says(predict.Run(tmp_path / "whole").params), found)


def test_devices_share_a_run_of_low_rank(recipe: Path, base: Path, tmp_path: Path) -> None:
    """With examples, factors and base divided over two devices the losses are those of one."""
    deep = r"backbone/encoder1/.*/kernel"
    rules = ((deep, (None, None, None, None, "fsdp")), (deep + "_lora_a", ("fsdp", None)), (".*", "fsdp"))

    def call(name: str, *more: str) -> list[str]:
        given = (f"init.source={base}", "peft.type=lora", "peft.rank=1", "optim.lr=0.02", "train.total=3 steps")
        return layouts.arguments(recipe, tmp_path / name, *layouts.BARE, *given, *more)

    alone = layouts.start([call("one")], devices=1, log=tmp_path / "one.log")
    split = [call("fsdp", "mesh.data=1", "mesh.fsdp=2", f"mesh_rules={rules!r}")]
    pair = layouts.start(split, devices=2, log=tmp_path / "fsdp.log")
    assert [p.wait() for p in (*alone, *pair)] == [0, 0], Path(f"{tmp_path / 'fsdp.log'}.0").read_text()
    want, found = (list(layouts.losses(tmp_path / name).values()) for name in ("one", "fsdp"))
    np.testing.assert_allclose(found, want, rtol=1e-5)
    # It is read back on one device.
    predict.Run(tmp_path / "fsdp", kind="latest")


def test_a_run_says_what_trains_and_what_stays_at_random(recipe: Path, base: Path, tmp_path: Path, capsys: Any) -> None:
    main.main(
        [f"--config={recipe}", f"--config.init.source={base}", "--config.init.skip=('backbone/up0/.*',)",
         "--config.peft.type=probe", "--config.train.total=1 steps", "--config.eval.pictures=false",
         "--config.eval.predictions=false", f"--workdir={tmp_path}"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "missing   backbone/up0 (2), at random AND FROZEN" in out
    assert "trains      " in out
    assert "probe, 2 of " in out
    # What no source fills is in the checkpoint.
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert set(peft.flat(checkpoints.parameters("latest", 1)[1])) == {"backbone/up0/kernel", "backbone/up0/bias"}
    checkpoints.close()
    predict.Run(tmp_path)


# --- depth -----------------------------------------------------------------------------------------------------------

TREE = {
    "backbone": {
        "encoder0": {"kernel": jnp.array([1.0, -2.0])},
        "encoder1": {"kernel": jnp.array([0.5])},
        "up0": {"kernel": jnp.array([2.0])},
    },
    "heads_a": {"kernel": jnp.array([3.0])},
}
GRADS = jax.tree.map(lambda p: 0.1 * p + 0.3, TREE)


def by_depth(**changes: Any) -> tuple[Any, Any]:
    config = settings(**changes)
    division = peft.divide(config, {path: leaf.shape for path, leaf in peft.flat(TREE).items()})
    duration = lambda text, key: config_lib.steps(text, batch_size=1, n_examples=1, key=key)  # noqa: E731
    return peft.by_depth(config, division, duration)


def test_layer_wise_factors_by_hand() -> None:
    scales, begins = by_depth(optim__layer_decay=0.5)
    assert begins is None
    got = {path: float(v) for path, v in peft.flat(scales).items()}
    want = {"encoder0": 0.25, "encoder1": 0.5, "up0": 1.0}
    assert got == {**{f"backbone/{k}/kernel": v for k, v in want.items()}, "heads_a/kernel": 1.0}
    config = settings(optim__momentum=0.0, optim__weight_decay=0.0, optim__clip=0.0, optim__schedule="constant").optim
    for name, factor in (("encoder0", 0.25), ("encoder1", 0.5), ("up0", 1.0)):
        moved = []
        for tree in (None, scales):
            tx, _ = optim.build(config, TREE, 10, scales=tree)
            moved.append(tx.update(GRADS, tx.init(TREE), TREE)[0]["backbone"][name]["kernel"])
        np.testing.assert_allclose(moved[1], factor * moved[0], rtol=1e-6)


def test_a_transformers_factors_are_the_published_ones() -> None:
    """decay ** (L + 1 - i) for the embedding (i = 0) and blocks 1 to L; 1 for the head."""
    shapes = {f"backbone/encoder/block{i}/qkv/kernel": (8, 24) for i in range(12)}
    shapes |= {"backbone/encoder/embed/kernel": (4, 4, 4, 1, 8), "heads_a/dense/kernel": (8, 2)}
    config = settings(optim__layer_decay=0.75)
    config.model.name = "vit"
    scales, _ = peft.by_depth(config, peft.divide(config, shapes), lambda text, key: 0)
    got = peft.flat(scales)
    assert got["backbone/encoder/embed/kernel"] == pytest.approx(0.75**13)
    for i in range(12):
        assert got[f"backbone/encoder/block{i}/qkv/kernel"] == pytest.approx(0.75 ** (12 - i))
    assert got["heads_a/dense/kernel"] == 1


@pytest.mark.parametrize(("name", "warmup"), [("adamw", 0), ("sgd", 0), ("adamw", 2), ("adamw", 3)])
def test_a_stage_that_begins_late_is_as_if_training_began_then(name: str, warmup: int) -> None:
    """With the same warm-up, whether the run's is over (2) or not (3)."""
    _, begins = by_depth(optim__decoder_first="2 steps", optim__unfreeze=("4 steps", "1 steps"))
    config = settings(optim__name=name, optim__lr=0.1, optim__schedule="constant", optim__clip=0.0).optim
    tx, _ = optim.build(config, TREE, 10, warmup, begins=begins)
    fresh, _ = optim.build(config, TREE, 10, warmup)
    params, state = TREE, tx.init(TREE)
    history = [params]
    for _ in range(6):
        updates, state = tx.update(GRADS, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        history.append(params)
    for stage, begin in (("encoder0", 4), ("encoder1", 2), ("up0", 0)):
        took = [tree["backbone"][stage]["kernel"] for tree in history]
        for before in took[: begin + 1]:
            np.testing.assert_array_equal(before, TREE["backbone"][stage]["kernel"])
        alone, moments = TREE, fresh.init(TREE)
        for got in took[begin + 1 :]:
            updates, moments = fresh.update(GRADS, moments, alone)
            alone = jax.tree.map(jnp.add, alone, updates)
            np.testing.assert_allclose(got, alone["backbone"][stage]["kernel"], rtol=1e-6)


def test_what_has_not_begun_does_not_count_in_the_clipped_norm() -> None:
    _, begins = by_depth(optim__decoder_first="5 steps")
    config = settings(
        optim__lr=1.0, optim__schedule="constant", optim__momentum=0.0, optim__weight_decay=0.0, optim__clip=1e-3
    ).optim
    tx, _ = optim.build(config, TREE, 10, begins=begins)
    updates, _ = tx.update(GRADS, tx.init(TREE), TREE)
    assert float(optax.global_norm(updates)) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim__layer_decay": 0.0}, "optim.layer_decay=0.0 must be in"),
        ({"optim__unfreeze": ("1 steps",)}, "one duration an encoder stage, from the image on: 2"),
        ({"optim__decoder_first": "soon"}, "'optim.decoder_first' is 'soon'"),
        ({"optim__decoder_first": "1000 steps"}, "optim.decoder_first: 1000 steps of standing still in a run of 1000"),
        ({"optim__unfreeze": ("2000 steps", "0 steps")}, "optim.unfreeze: 2000 steps of standing still"),
        ({"optim__unfreeze": (300, 0)}, "'optim.unfreeze' is '300'; write e.g. '500 steps'"),
        ({"optim__layer_decay": 0.5, "model__name": "mlp"}, "the depth of the stages of model.name 'mlp' is not known"),
    ],
)
def test_depth_that_cannot_be_meant(changes: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        by_depth(**changes)
    assert words in str(caught.value)


def test_late_stages_resume_bit_identical(recipe: Path, tmp_path: Path) -> None:
    command = [
        f"--config={recipe}", "--config.optim.decoder_first=1 steps", "--config.optim.unfreeze=('3 steps','2 steps')",
        "--config.optim.layer_decay=0.5", "--config.train.total=4 steps", "--config.eval.pictures=false",
        "--config.eval.predictions=false", "--config.eval.splits=('val',)",
    ]  # fmt: skip
    main.main([*command, f"--workdir={tmp_path / 'whole'}"])
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "latest" / "4")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "best")
    main.main([*command, f"--workdir={tmp_path / 'again'}"])
    assert state_bytes(tmp_path / "again") == state_bytes(tmp_path / "whole")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["optim"]["layer_decay"] == 0.5
