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
        assert (REPO / "configs" / recipe).read_text().startswith(('"""', 'r"""'))
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
        ("data.patch=(64,64)", "data.patch=(64, 64): needs three whole numbers from 1 on"),
        ("data.patch=16", "data.patch=(16,): needs three whole numbers"),
        ("data.patch=(16,16,0)", "data.patch=(16, 16, 0): needs three whole numbers"),
        ("data.batch_size=0", "data.batch_size=0: needs a whole number from 1 on"),
        ("data.batch_size=-2", "data.batch_size=-2: needs a whole number from 1 on"),
        ("data.buckets=-1", "data.buckets=-1: needs a whole number from 0 on"),
        ("data.workers=-1", "data.workers=-1: needs a whole number from 0 on"),
        ("data.foreground=1.5", "data.foreground=1.5: needs a number from 0 to 1"),
        ("data.foreground=-1", "data.foreground=-1.0: needs a number from 0 to 1"),
        ("data.split=abc", "data.split=abc: needs a table"),
        ("data.split={'fold': 1, 'flods': 5}", "did you mean 'data.split.folds'"),
        ("model=vit", "model=vit: needs a table"),
        ("tasks.foo=bar", "tasks.foo='bar': needs a table of options with a 'type'"),
        ("tasks.brain=bar", "tasks.brain=bar: needs a table"),
        ("tasks.foo={'levels': 2}", "'tasks.foo' needs a 'type'"),
        ("optim.accumulate=0", "optim.accumulate=0: needs a whole number from 1 on"),
        ("optim.betas=0.9", "optim.betas=(0.9,): needs two numbers"),
        ("optim.betas=(0.9,1.5)", "optim.betas=(0.9, 1.5): needs two numbers"),
        ("optim.momentum=2", "optim.momentum=2.0: needs a number from 0 on, less than 1"),
        ("optim.power=-1", "optim.power=-1.0: needs a number from 0 on"),
        ("optim.power=1e999", "optim.power=inf: needs a number from 0 on"),
        ("train.patience=-1", "train.patience=-1: needs a whole number from 0 on"),
        ("train.nan_limit=-1", "train.nan_limit=-1: needs a whole number from 0 on"),
        ("train.eval_cases=-1", "train.eval_cases=-1: needs a whole number from 0 on"),
        ("eval.windows=0", "eval.windows=0: needs a whole number from 1 on"),
    ],
)
def test_a_wrong_override_names_the_key_and_the_nearest(override: str, words: str) -> None:
    with pytest.raises(UserError, match="config: ") as caught:
        load((override,))
    assert words in str(caught.value)


def test_a_table_keeps_what_it_does_not_name() -> None:
    config = load(("data.split={'folds': 5}", "tasks.more={'type': 'segmentation'}"))
    assert config.data.split.folds == 5
    assert (config.data.split.file, config.data.split.fold) == ("split.csv", 0)
    assert config.tasks.more.levels == 3


def test_a_name_in_place_of_a_table() -> None:
    config = load()
    config.unlock()
    with config.ignore_type():
        config.data.preprocess.normalize = ConfigDict({"t1": "zscore"})
        config.data.targets.brain = ConfigDict({"column": "x"})
    config_lib.resolve(config, ("data.preprocess.normalize=ct", "data.targets.brain=y"), options)
    assert (config.data.preprocess.normalize, config.data.targets.brain) == ("ct", "y")


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
    ("text", "steps"), [("500 steps", 500), ("2 epochs", 13), ("1 epoch", 7), ("101 examples", 26), ("1e3 steps", 1000),
     ("0.5 steps", 1), ("500.2 steps", 501), (".5 epochs", 4), ("1. steps", 1), ("1e-3 steps", 1), ("0 steps", 0)],
)  # fmt: skip
def test_durations(text: str, steps: int) -> None:
    assert config_lib.steps(text, batch_size=4, n_examples=25) == steps


@pytest.mark.parametrize(
    "text",
    ["500", "ten steps", "5 hours", "-1 steps", "1.2.3 steps", "1e9999 steps", "1e300 steps", "1e steps", ". steps"],
)
def test_wrong_durations(text: str) -> None:
    with pytest.raises(UserError, match=r"'train.total' is"):
        config_lib.steps(text, batch_size=4, n_examples=25, key="train.total")


def test_difference_names_what_changed() -> None:
    a, b = load(), load(("optim.lr=0.5", "data.patch=(32,32,32)"))
    assert config_lib.difference(a, b) == [
        "data.patch: (64, 64, 64) -> (32, 32, 32)",
        f"optim.lr: {a.optim.lr} -> 0.5",
    ]
