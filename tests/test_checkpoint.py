"""Checkpoints: what was saved is what comes back, the best never evicts the latest, and another model is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medjax import checkpoint
from medjax.errors import UserError


def like(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def test_an_asynchronous_save_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    """The step overwrites its donated state while the writer is at work."""
    state = {"a": jnp.arange(3_000_000, dtype=jnp.float32), "b": jnp.ones((1000, 1000))}
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 1.5 + 1, s), donate_argnums=0)
    state = step(state)
    want = jax.tree.map(lambda x: np.array(x, copy=True), state)
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save("latest", 7, state, {"step": 7, "nested": {"x": [1, 2]}})
    for _ in range(10):
        state = step(state)
    jax.block_until_ready(state)
    checkpoints.wait()
    got = checkpoints.restore("latest", 7, like(state))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert checkpoints.meta("latest", 7) == {"step": 7, "nested": {"x": [1, 2]}}
    checkpoints.close()


def test_latest_keeps_two_and_best_one_apart(tmp_path: Path) -> None:
    checkpoints = checkpoint.Checkpoints(tmp_path)
    assert checkpoints.newest("latest") is None
    for step in (1, 2, 3, 4):
        checkpoints.save("latest", step, {"x": jnp.full(3, step)}, {"step": step})
        if step in (1, 2):
            checkpoints.save("best", step, {"x": jnp.full(3, step)}, {"step": step})
    checkpoints.close()
    again = checkpoint.Checkpoints(tmp_path, read_only=True)
    assert (again.newest("latest"), again.newest("best")) == (4, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "latest").iterdir()) == ["3", "4"]
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "best").iterdir()) == ["2"]
    again.close()


def test_what_is_removed_is_at_no_time_half_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process killed while an old checkpoint goes leaves it whole and apart; the next one deletes it."""
    latest, removed = tmp_path / "checkpoints" / "latest", tmp_path / "checkpoints" / "latest" / ".removed"
    with monkeypatch.context() as patch, checkpoint.Checkpoints(tmp_path) as checkpoints:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)  # killed before it could
        for step in (1, 2, 3):
            checkpoints.save("latest", step, {"x": jnp.full(3, step)}, {"step": step})
        checkpoints.wait()
        assert sorted(p.name for p in latest.iterdir()) == [".removed", "2", "3"]
        assert {p.name for p in (removed / "1").iterdir()} >= {"meta", "state"}
    with checkpoint.Checkpoints(tmp_path, read_only=True) as reader:
        assert reader.steps("latest") == [3, 2]
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert not removed.exists()
        assert checkpoints.steps("latest") == [3, 2]


def test_a_step_saved_again_replaces_the_first(tmp_path: Path) -> None:
    checkpoints = checkpoint.Checkpoints(tmp_path)
    for value in (1.0, 2.0):
        checkpoints.save("best", 5, {"x": jnp.full(3, value)}, {"value": value})
    checkpoints.wait()
    assert checkpoints.meta("best", 5) == {"value": 2.0}
    np.testing.assert_array_equal(checkpoints.restore("best", 5, like({"x": jnp.zeros(3)}))["x"], [2, 2, 2])
    checkpoints.close()


@pytest.mark.parametrize("average", [None, {"w": jnp.full(4, 9.0)}])
def test_the_parameters_to_evaluate_come_alone(tmp_path: Path, average: Any) -> None:
    checkpoints = checkpoint.Checkpoints(tmp_path)
    params = {"w": jnp.arange(4.0)}
    state = {"step": jnp.zeros((), jnp.int32), "params": params, "opt_state": {"m": jnp.ones(100)}, "average": average}
    checkpoints.save("latest", 1, state, {})
    checkpoints.wait()
    got = checkpoints.restore_parameters("latest", 1, like(params))
    np.testing.assert_array_equal(got["w"], (average or params)["w"])
    with pytest.raises(UserError, match=r"w: \(4,\) in the checkpoint, \(5,\) in the model"):
        checkpoints.restore_parameters("latest", 1, like({"w": jnp.zeros(5)}))
    checkpoints.close()


def test_another_architecture_is_refused_parameter_by_parameter(tmp_path: Path) -> None:
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save("latest", 1, {"params": {"a": jnp.ones(2), "b": {"kernel": jnp.ones((3, 3))}}}, {})
    checkpoints.wait()
    other = {"params": {"a": jnp.ones(3), "c": jnp.ones(1)}}
    with pytest.raises(UserError) as caught:
        checkpoints.restore("latest", 1, like(other))
    text = str(caught.value)
    assert "params/a: (2,) in the checkpoint, (3,) in the model" in text
    assert "params/b/kernel (3, 3): in the checkpoint, not in the model" in text
    assert "params/c (1,): in the model, not in the checkpoint" in text
    assert str(tmp_path) in text
    checkpoints.close()


def test_a_run_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run folder"):
        checkpoint.require(tmp_path / "nope")
    (tmp_path / "checkpoints" / "latest").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoint.require(tmp_path)
