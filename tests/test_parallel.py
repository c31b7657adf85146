"""Meshes: where parameters lie, equal results from every layout, moving from one to another, bytes of a device."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import layouts
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from tiny import write_cohort, write_recipe

from medjax import parallel
from medjax.errors import UserError

STEPS = 50


def mesh(**axes: int) -> Any:
    """As far as rules look at one."""
    return SimpleNamespace(shape={"data": 1, "fsdp": 1, "space": 1} | axes)


PARAMS = {
    "encoder": {"kernel": jnp.zeros((3, 3, 3, 16, 32)), "bias": jnp.zeros(32)},
    "head": {"kernel": jnp.zeros((1, 1, 1, 999, 7))},
}


def test_fsdp_splits_the_longest_axis_that_divides() -> None:
    specs = parallel.param_specs(PARAMS, ((r".*", "fsdp"),), mesh(fsdp=8))
    assert specs == {
        "encoder/kernel": P(None, None, None, None, "fsdp"),
        "encoder/bias": P(),  # too small to be worth it
        "head/kernel": P(),  # no axis divides
    }
    assert parallel.param_specs(PARAMS, ((r".*", "fsdp"),), mesh(fsdp=3))["head/kernel"] == P(None, None, None, "fsdp")


def test_the_first_rule_that_matches_rules() -> None:
    rules = ((r"encoder/.*kernel", (None, None, None, "fsdp", None)), (r".*bias", "replicate"), (r".*", "fsdp"))
    specs = parallel.param_specs(PARAMS, rules, mesh(fsdp=8))
    assert specs["encoder/kernel"] == P(None, None, None, "fsdp", None)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (((r"encoder.*", "fsdp"),), "cover no parameter 'head/kernel'"),
        (((r"decoder.*", "fsdp"), (r".*", "fsdp")), "'decoder.*' matches no parameter"),
        (((r".*", "columns"),), "'columns'"),
        (((r"(head", "fsdp"),), "head' is no regular expression"),
        (((r".*/kernel", (None, "fsdp")), (r".*", "fsdp")), "2 places for 'encoder/kernel'"),
        (((r"head.*", (None, None, None, None, "fsdp")), (r".*", "fsdp")), "an axis of 7, which mesh.fsdp=8"),
    ],
)
def test_rules_that_cannot_be_are_refused(rules: Any, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("*", r"\*").replace(".", r"\.")):
        parallel.param_specs(PARAMS, rules, mesh(fsdp=8))


def test_what_the_optimizer_keeps_lies_where_the_parameter_does() -> None:
    state = {"params": PARAMS, "opt_state": optax.adam(1e-3).init(PARAMS), "average": PARAMS, "step": jnp.zeros(())}
    here = parallel.make_mesh({"data": -1})
    found = parallel.state_shardings(
        state, PARAMS, ((r".*kernel", (None,) * 3 + ("fsdp", None)), (r".*", "fsdp")), here
    )
    spread = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, where in jax.tree_util.tree_leaves_with_path(found)
        if where.spec != P()
    ]
    parts = ("average", "opt_state/0/mu", "opt_state/0/nu", "params")
    assert spread == [f"{part}/{name}/kernel" for part in parts for name in ("encoder", "head")]


def test_meshes_that_cannot_be_are_refused() -> None:
    n = jax.device_count()
    for shape in ({"data": n + 1}, {"data": -1, "fsdp": -1}, {"data": 0}, {"data": -1, "space": n + 1}):
        with pytest.raises(UserError, match="does not fit"):
            parallel.make_mesh(shape)
    with pytest.raises(UserError, match="unknown mesh axis 'model'; known: data, fsdp, space"):
        parallel.make_mesh({"model": 1})
    with pytest.raises(UserError, match="a multiple of 12"):
        parallel.check_batch(8, 3, mesh(data=2, fsdp=2))
    with pytest.raises(UserError, match="a multiple of 32"):
        parallel.check_space((48, 32, 32), (8, 8, 8), mesh(space=4))
    with pytest.raises(UserError, match="known: jit, pmap"):
        parallel.check_mode("vmap", mesh())
    with pytest.raises(UserError, match="use parallel='jit'"):
        parallel.check_mode("pmap", SimpleNamespace(shape=mesh(fsdp=2).shape, size=2))


class Device(SimpleNamespace):
    """A device as far as shares of a batch are concerned."""


@pytest.mark.parametrize(
    ("processes", "shape", "shares"),
    [
        ((0, 0, 1, 1), (4, 1, 1), {0: (0, 2), 1: (2, 2)}),
        ((0, 0, 1, 1), (2, 1, 2), {0: (0, 1), 1: (1, 1)}),
        ((0, 0, 1, 1), (1, 1, 4), {0: (0, 1), 1: (0, 1)}),  # space over both: they feed the same rows
        ((0, 1, 2, 3), (2, 1, 2), {0: (0, 1), 1: (0, 1), 2: (1, 1), 3: (1, 1)}),
        ((0, 1, 0, 1), (4, 1, 1), None),  # dealt out: a process's rows would not follow one another
    ],
)
def test_shares_of_a_batch(processes: Any, shape: Any, shares: Any) -> None:
    devices = np.array([Device(process_index=p) for p in processes], dtype=object).reshape(shape)
    found = parallel._shares(SimpleNamespace(devices=devices, shape={"space": shape[2]}))  # type: ignore[arg-type]
    assert found == shares


# --- whole runs ------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "eight": (),
    "fsdp": ("mesh.data=4", "mesh.fsdp=2"),
    "space": ("mesh.data=4", "mesh.space=2"),
    "pmap": ("parallel=pmap",),
}
# Over two processes of two devices each.
PAIRS: dict[str, tuple[str, ...]] = {
    "pair_pmap": ("parallel=pmap",),
    "pair_fsdp": ("mesh.data=1", "mesh.fsdp=4"),
    "pair_space": ("mesh.data=1", "mesh.space=4"),  # a volume lies over both
}
FEW = 10  # steps of these


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of 50 steps by every layout; and one that goes from layout to layout, 10 steps in each."""
    folder = tmp_path_factory.mktemp("layouts")
    recipe = write_recipe(folder / "tiny.py", write_cohort(folder / "cohort"))

    def call(name: str, *overrides: str, total: int = STEPS) -> list[str]:
        # At twice this rate rounding alone grows to 1.7e-5 within the 50 steps where XLA convolves.
        given = ("optim.name=sgd", "optim.lr=0.005", f"train.total={total} steps")
        return layouts.arguments(recipe, folder / name, *given, *overrides)

    # The many devices of a process share two cores: what waits for nothing else runs side by side.
    alone = layouts.start([call("one"), call("moving", total=10)], devices=1, log=folder / "one.log")
    many = [call(name, *overrides) for name, overrides in LAYOUTS.items()]
    eight = layouts.start(many, devices=8, log=folder / "eight.log")
    assert [p.wait() for p in alone] == [0], Path(f"{folder / 'one.log'}.0").read_text()
    for name, total in (("pair", STEPS), ("moving", 20)):
        options: dict[str, Any] = {"log": folder / f"{name}.log", "tensorflow": name == "pair"}
        pair = layouts.start([call(name, total=total)], devices=4, processes=2, **options)
        assert [p.wait() for p in pair] == [0, 0], Path(f"{folder / name}.log.0").read_text()
    short = [call(name, *overrides, total=FEW) for name, overrides in PAIRS.items()]
    pair = layouts.start(short, devices=2, processes=2, log=folder / "pairs.log")
    assert [p.wait() for p in pair] == [0, 0], Path(f"{folder / 'pairs.log'}.0").read_text()
    assert [p.wait() for p in eight] == [0], Path(f"{folder / 'eight.log'}.0").read_text()
    moves = [call("moving", *LAYOUTS[name], total=total) for name, total in (("fsdp", 30), ("space", 40), ("pmap", 50))]
    for process in layouts.start(moves, devices=8, log=folder / "moving.log"):
        assert process.wait() == 0, Path(f"{folder / 'moving.log'}.0").read_text()
    return folder


@pytest.mark.parametrize("name", [*LAYOUTS, "pair", "moving"])
def test_every_layout_gives_the_losses_of_one_device(runs: Path, name: str) -> None:
    same_losses(runs, name, STEPS)
    scores = [json.loads((runs / n / "eval" / "val" / "summary.json").read_text())["metrics"] for n in ("one", name)]
    assert scores[1]["dice"]["mean"] == pytest.approx(scores[0]["dice"]["mean"], abs=5e-3)


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_give_them_as_well(runs: Path, name: str) -> None:
    same_losses(runs, name, FEW)
    scores = [json.loads((runs / n / "eval" / "val" / "summary.json").read_text())["metrics"] for n in PAIRS]
    assert [s["dice"]["mean"] for s in scores] == pytest.approx([scores[0]["dice"]["mean"]] * len(PAIRS), abs=5e-3)


def same_losses(runs: Path, name: str, steps: int) -> None:
    want, found = layouts.losses(runs / "one"), layouts.losses(runs / name)
    assert list(found) == list(range(1, steps + 1))
    np.testing.assert_allclose(list(found.values()), [want[n] for n in found], rtol=1e-5)


def test_what_is_written_once_is_written_by_one_process(runs: Path) -> None:
    said = [Path(f"{runs / 'pair.log'}.{n}").read_text() for n in (0, 1)]
    assert "trained to step 50" in said[0]
    assert "8 × cpu of 2 processes" in said[0]
    # Gloo's threads write pieces of lines between each other's.
    gloo = re.compile(
        r"\[Gloo\]|Rank \d+ is connected to \d+ peer ranks\.|Expected number of connected peer ranks is : \d+"
    )
    assert gloo.sub("", said[1]).split() == []
    assert (runs / "pair" / "config.json").is_file()


# --- bytes -----------------------------------------------------------------------------------------------------------

BYTES = """
import json, math, os, pathlib, sys
os.environ |= {{'XLA_FLAGS': '--xla_force_host_platform_device_count=8', 'MEDJAX_NATIVE': '0'}}
sys.path[:0] = [{tests!r}]
import jax
import test_train as t
from medjax import job as job_lib, parallel, report, step as step_lib

def compiled(*overrides):
    config = t.load(pathlib.Path({recipe!r}), 'augment.mirror=()', 'augment.affine.p=0.0', 'augment.gamma.p=0.0',
                    'augment.noise.p=0.0', *overrides)
    mesh, job = parallel.make_mesh(config.mesh), job_lib.open_job(config)
    state = step_lib.abstract_state(config, job, mesh)
    rows = {{}}
    n, patch = config.data.batch_size, tuple(config.data.patch)
    for key, value in t.a_batch(n).items():
        shape = (n, *patch, *value.shape[4:]) if value.ndim >= 4 else value.shape
        kind = jax.dtypes.canonicalize_dtype(value.dtype)
        rows[key] = jax.ShapeDtypeStruct(shape, kind, sharding=parallel.batch_sharding(mesh))
    step = step_lib.make_train_step(config, job, step_lib.make_state(config, job)[0], mesh)
    cost = report.compile_step(step, state, rows)
    batch = sum(math.prod(r.shape) * r.dtype.itemsize for r in jax.tree.leaves(rows)) // parallel.ways(mesh)
    return [cost.arguments - batch, cost.temporaries]

wide, deep = 'model.features=(32,64,128)', ('data.patch=(128,32,32)', 'model.features=(16,32)')
print(json.dumps([
    compiled(wide, 'data.batch_size=8'), compiled(wide, 'data.batch_size=8', 'mesh.data=1', 'mesh.fsdp=8'),
    compiled(*deep, 'data.batch_size=8'), compiled(*deep, 'data.batch_size=1', 'mesh.data=1', 'mesh.space=8'),
]))
"""


def test_bytes_of_one_device_shrink_with_the_mesh(tmp_path: Path) -> None:
    """What the compiler says of the step: held state for fsdp, temporaries (activations) for space."""
    recipe = write_recipe(tmp_path / "tiny.py", write_cohort(tmp_path / "cohort"))
    code = BYTES.format(tests=str(layouts.REPO / "tests"), recipe=str(recipe))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=layouts.REPO)
    assert done.returncode == 0, done.stderr
    (whole, _), (split, _), (_, one), (_, eighth) = json.loads(done.stdout.splitlines()[-1])
    print({"state": [whole, split, whole / split], "activations": [one, eighth, one / eighth]})
    assert split <= whole / 7
    assert eighth <= one / 6
