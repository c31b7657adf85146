"""Configurations: merging, overrides, strictness, durations."""

from __future__ import annotations

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from medjax import config as config_lib
from medjax import models, tasks
from medjax.errors import UserError

REPO = Path(__file__).resolve().parents[1]


def options(room: str, kind: str) -> dict:
    return {"model": models.options, "tasks": tasks.options}[room](kind)


def load(overrides: tuple[str, ...] = (), recipe: str = "brain_seg.py") -> ConfigDict:
    return config_lib.load(str(REPO / "configs" / recipe), overrides, options)


@pytest.mark.parametrize("recipe", sorted(f.name for f in (REPO / "configs").glob("*.py")))
def test_every_recipe_resolves(recipe: str) -> None:
    for arg in ("", ":debug"):
        config = load(recipe=recipe + arg)
        assert config.name == recipe.removesuffix(".py")
        assert (REPO / "configs" / recipe).read_text().startswith('"""')
        restored = config_lib.from_json(config_lib.to_json(config))
        assert config_lib.to_json(restored) == config_lib.to_json(config)


def test_overrides_take_the_type_of_the_key() -> None:
    config = load(
        ("optim.lr=1", "data.patch=32,32,64", "model.features=(8,16)", "train.total=3 epochs", "eval.pictures=false",
         "data.preprocess.spacing=median", "tasks.brain.dice=2.5", "augment.mirror=()")
    )  # fmt: skip
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)
    assert config.data.patch == (32, 32, 64)
    assert config.model.features == (8, 16)
    assert config.train.total == "3 epochs"
    assert config.eval.pictures is False
    assert config.data.preprocess.spacing == "median"
    assert config.tasks.brain.dice == 2.5
    assert config.augment.mirror == ()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lrr=1", "'optim.lr'"),
        ("otpim.lr=1", "'optim'"),
        ("model.featurs=(1,2)", "'model.features'"),
        ("tasks.brain.dise=1", "'tasks.brain.dice'"),
        ("tasks.brian.dice=1", "'tasks.brain'"),
        ("optim.lr=fast", "needs float"),
        ("data.patch", "needs a value"),
        ("data.batch_size=2.5", "needs int"),
        ("model.name=unett", "unet"),
        ("train.total.x=1", "unknown key"),
    ],
)
def test_a_wrong_override_names_the_key_and_the_nearest(override: str, words: str) -> None:
    with pytest.raises(UserError, match="config: ") as caught:
        load((override,))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("c.optm = ConfigDict({'lr': 1.0})", "did you mean 'optim'"),
        ("c.optim = ConfigDict({'learning_rate': 1.0})", "unknown key 'optim.learning_rate'"),
        ("c.model = ConfigDict({'name': 'unet', 'feature': (1,)})", "did you mean 'model.features'"),
        ("c.tasks = ConfigDict({'a': {'levels': 2}})", "'tasks.a' needs a 'type'"),
        ("c.tasks = ConfigDict({'a': {'type': 'segmentatoin'}})", "segmentation"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, body: str, words: str) -> None:
    recipe = tmp_path / "r.py"
    recipe.write_text(
        "from ml_collections import ConfigDict\n"
        f"def get_config(arg=None):\n    c = ConfigDict()\n    {body}\n    return c\n"
    )
    with pytest.raises(UserError) as caught:
        config_lib.load(str(recipe), (), options)
    assert words in str(caught.value)


def test_a_missing_recipe_is_named() -> None:
    with pytest.raises(UserError, match=r"no such file 'configs/nope.py'"):
        config_lib.load("configs/nope.py", (), options)


def test_parse_arg_is_strict() -> None:
    assert config_lib.parse_arg("debug,width=8", debug=False, width=4).to_dict() == {"debug": True, "width": 8}
    assert config_lib.parse_arg(None, debug=False).debug is False
    assert config_lib.parse_arg("debug=false", debug=True).debug is False
    with pytest.raises(UserError, match=r"did you mean 'argument\.debug'"):
        config_lib.parse_arg("debgu", debug=False)
    with pytest.raises(UserError, match="not of type int"):
        config_lib.parse_arg("width=wide", width=4)


@pytest.mark.parametrize(
    ("text", "steps"), [("500 steps", 500), ("2 epochs", 13), ("1 epoch", 7), ("101 examples", 26), ("1e3 steps", 1000)]
)
def test_durations(text: str, steps: int) -> None:
    assert config_lib.steps(text, batch_size=4, n_examples=25) == steps


@pytest.mark.parametrize("text", ["500", "ten steps", "5 hours", "-1 steps"])
def test_wrong_durations(text: str) -> None:
    with pytest.raises(UserError, match=r"'train.total' is"):
        config_lib.steps(text, batch_size=4, n_examples=25, key="train.total")


def test_difference_names_what_changed() -> None:
    a, b = load(), load(("optim.lr=0.5", "data.patch=(32,32,32)"))
    assert config_lib.difference(a, b) == [
        "data.patch: (64, 64, 64) -> (32, 32, 32)",
        f"optim.lr: {a.optim.lr} -> 0.5",
    ]
