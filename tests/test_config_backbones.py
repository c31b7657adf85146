"""`config.model.name` on the command line: another backbone in a shipped recipe, and options it cannot have."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from medjax import config as config_lib
from medjax import errors, job, models, tasks
from medjax.data import sampler
from medjax.errors import UserError

REPO = Path(__file__).resolve().parents[1]


def options(room: str, kind: str) -> dict:
    return {"model": models.options, "tasks": tasks.options}[room](kind)


def load(*overrides: str, recipe: str = "brain_seg.py:debug") -> ConfigDict:
    return config_lib.load(str(REPO / "configs" / recipe), overrides, options)


@pytest.fixture(autouse=True)
def fresh_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_said", set())


# Small enough to trace quickly; of the others the defaults are.
SMALL = {
    "unet": ("features=(4,8,8)",),
    "nnunet": ("features=(4,8,8)",),
    "resenc": ("features=(4,8,8)", "blocks=1"),
    "resnet": ("features=(4,8,8,8)", "depth=10", "decoder=unet"),
    "densenet": ("features=8", "growth=4", "blocks=(1,1)", "decoder=unet"),
    "inception": ("width=0.05", "decoder=unet"),
    "mednext": ("features=12",),
    "vit": ("features=24", "depth=4", "heads=2", "mlp=24", "decoder=unetr"),
    "unetr": ("features=24", "depth=4", "heads=2", "mlp=24"),
    "swin": ("features=6", "depths=(1,1)", "heads=(1,2)", "decoder=unet"),
    "swin_unetr": ("features=6", "depths=(1,1)", "heads=(1,2)"),
}


def test_every_backbone_is_here() -> None:
    assert set(SMALL) == set(models.BACKBONES)


@pytest.mark.parametrize("name", SMALL)
def test_a_recipe_trains_every_backbone(name: str, capsys: pytest.CaptureFixture) -> None:
    config = load(f"model.name={name}", *(f"model.{option}" for option in SMALL[name]))
    said = capsys.readouterr().err
    assert ("model.name=" in said) == (name != "unet")
    opened = job.open_job(config)
    sampler.check_multiple(config.data.patch, opened.model.backbone.total_factor())
    image = jnp.zeros((1, *config.data.patch, 4))
    shapes = jax.eval_shape(lambda: opened.model.init_with_output(jax.random.key(0), image, train=False)[0])
    assert shapes["brain"][0].shape[:4] == (1, *config.data.patch)


@pytest.mark.parametrize("name", sorted(models.BACKBONES))
def test_a_backbone_alone_takes_its_defaults(name: str, capsys: pytest.CaptureFixture) -> None:
    config = load(f"model.name={name}")
    said = capsys.readouterr().err
    if name == "unet":
        assert "note" not in said
        assert config.model.features == (8, 16, 32)
        return
    assert dict(config.model) == {"name": name, **models.options(name)}
    assert said.count("medjax: note:") == 1
    assert "in place of the recipe's unet" in said
    assert "model.features, model.levels" in said
    if name in ("densenet", "inception", "vit", "swin"):
        with pytest.raises(UserError, match="it is an encoder alone"):
            job.open_job(config)


def test_what_is_given_is_not_called_left_out(capsys: pytest.CaptureFixture) -> None:
    config = load("model.features=12", "model.levels=2", "model.name=mednext")
    assert (config.model.features, config.model.levels) == (12, 2)
    assert "note" not in capsys.readouterr().err


def test_the_recipes_own_backbone_keeps_its_options() -> None:
    assert load("model.name=unet") == load()


def test_a_backbone_chosen_in_python_keeps_its_options(capsys: pytest.CaptureFixture) -> None:
    config = load(recipe="ablations/brain_seg.py:debug,backbone=mednext")
    assert (config.model.features, config.model.levels) == (4, 2)
    assert "note" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("model.name=mednext", "model.features=(12,24)"), "model.features=(12,24): needs int"),
        (("model.name=inception", "model.features=(12,24)"), "unknown key 'model.features'"),
        (("model.features=()",), "model.features=(): a network 'unet' needs a whole number from 1 on for each stage"),
        (("model.features=(8,0)",), "model.features=(8, 0)"),
        (("model.features=(8,16.5)",), "model.features=(8, 16.5)"),
        (("model.levels=-1",), "model.levels=-1: a network 'unet' needs a whole number from 0 on"),
        (("model.convs=0",), "model.convs=0"),
        (("model.convs=(1,2)",), "'model.convs' needs one number, or 3"),
        (("model.kernels=3",), "model.kernels"),
        (("model.factors=(0,2,2)",), "model.factors=(0, 2, 2)"),
        (("model.dropout=1.5",), "model.dropout=1.5"),
        (("model.name=vit", "model.patch=16"), "model.patch=(16,): a network 'vit' needs three whole numbers"),
        (
            ("model.name=resnet", "model.features=(4,4,4,4,4)", "model.factors=(2,2,2)", "data.patch=(64,64,64)"),
            "4 layers",
        ),
        (("model.name=nnunet", "model.features=(4,4,4,4,4,4,4)"), "multiple of the network's downsampling"),
        (("model.name=swin_unetr", "model.features=10"), "heads"),
    ],
)
def test_options_that_cannot_be(overrides: tuple[str, ...], words: str) -> None:
    def build() -> None:
        config = load(*overrides)
        backbone = models.build(config.model, jnp.float32)
        sampler.check_multiple(config.data.patch, backbone.total_factor())
        jax.eval_shape(lambda: backbone.init(jax.random.key(0), jnp.zeros((1, *config.data.patch, 1))))

    with pytest.raises(UserError) as caught:
        build()
    assert words in str(caught.value)


@pytest.mark.parametrize("value", ["2", "(1,1,2)"])
def test_one_number_or_one_a_stage(value: str) -> None:
    config = load("model.name=resenc", "model.features=(4,8,8)", f"model.blocks={value}", "model.decoder_convs=2")
    backbone = models.build(config.model, jnp.float32)
    shapes = jax.eval_shape(lambda: backbone.init(jax.random.key(0), jnp.zeros((1, 16, 16, 16, 1))))
    assert "block1_conv1" in shapes["params"]["encoder2"]
    assert ("block1_conv1" in shapes["params"]["encoder0"]) == (value == "2")
