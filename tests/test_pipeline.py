"""tf.data batches: the sampler's rows in the global order, from any step, on any number of processes and workers."""

from __future__ import annotations

from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from medjax.data.pipeline import Source, center_batches, train_batches
from medjax.data.sampler import Sampler, cut

PATCH = (6, 8, 4)


@pytest.fixture(scope="module")
def source() -> Source:
    rng = np.random.default_rng(0)
    cases: list[Any] = []
    for i in range(5):
        shape = (9 + i, 10, 5 - i % 2 * 3)  # some are thinner than the patch
        # One mask needs a wider type than the others.
        target = (rng.random(shape) < 0.1).astype(np.uint16 if i == 4 else np.uint8) * (300 if i == 4 else i % 2 + 1)
        cases.append(
            SimpleNamespace(
                image=rng.normal(size=(*shape, 2)).astype(np.float32),
                targets={"a": target} if i != 3 else {},  # case 3 has no label
                geometry=SimpleNamespace(spacing=(1.0, 2.0, 3.0)),
                present=(True, i != 1),
            )
        )
    return Source(cases, ("a",))


def take(n: int, batches: Any) -> list[dict[str, np.ndarray]]:
    return list(islice(batches, n))


def same(a: dict, b: dict) -> None:
    assert set(a) == set(b)
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_rows_are_the_samplers(source: Source) -> None:
    sampler = Sampler(7, 5, 0.5)
    for step, batch in enumerate(take(4, train_batches(source, sampler, patch=PATCH, batch_size=3))):
        assert batch["image"].shape == (3, *PATCH, 2)
        for i, example in enumerate(range(step * 3, step * 3 + 3)):
            number = sampler.case(example)
            case = source.cases[number]
            start = sampler.start(example, case.image.shape[:3], PATCH, source.points[number])
            assert batch["example"][i] == example
            np.testing.assert_array_equal(batch["image"][i], cut(case.image, start, PATCH))
            assert batch["a/mask"][i] == (number != 3)
            assert batch["modality"][i].tolist() == [True, number != 1]
            if number != 3:
                np.testing.assert_array_equal(batch["a/target"][i], cut(case.targets["a"], start, PATCH))
        assert batch["a/target"].dtype == np.uint16
        assert batch["valid"].all()
        np.testing.assert_array_equal(batch["spacing"], np.tile([1.0, 2.0, 3.0], (3, 1)).astype(np.float32))


def test_starting_later_or_with_other_workers_changes_nothing(source: Source) -> None:
    sampler = Sampler(7, 5, 0.5)
    whole = take(8, train_batches(source, sampler, patch=PATCH, batch_size=2, workers=1))
    later = take(3, train_batches(source, sampler, patch=PATCH, batch_size=2, first_step=5, workers=4))
    for a, b in zip(whole[5:], later, strict=True):
        same(a, b)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_order(source: Source, processes: int) -> None:
    sampler = Sampler(7, 5, 0.5)
    whole = take(3, train_batches(source, sampler, patch=PATCH, batch_size=4))
    parts = [
        take(3, train_batches(source, sampler, patch=PATCH, batch_size=4, process=p, processes=processes))
        for p in range(processes)
    ]
    for step, batch in enumerate(whole):
        same(batch, {k: np.concatenate([p[step][k] for p in parts]) for k in batch})


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_sees_each_case_once_and_pads_with_masks(source: Source, processes: int) -> None:
    parts = [
        list(center_batches(source, patch=PATCH, batch_size=2 * processes, process=p, processes=processes))
        for p in range(processes)
    ]
    assert len({len(p) for p in parts}) == 1  # no process runs out before another
    rows = [
        (int(e), bool(v), bool(m))
        for part in parts
        for b in part
        for e, v, m in zip(b["example"], b["valid"], b["a/mask"], strict=True)
    ]
    assert sorted(e for e, v, _ in rows if v) == [0, 1, 2, 3, 4]
    assert all(not m for _, v, m in rows if not v)
    assert sorted(e for e, v, m in rows if v and not m) == [3]
