"""tf.data batches: the sampler's rows in the global order, from any step, on any number of processes and workers."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from medjax.data import pipeline
from medjax.data.cases import Case
from medjax.data.pipeline import Source, center_batches, make_sampler, train_batches
from medjax.data.sampler import Sampler, bucket_shapes, cut
from medjax.errors import UserError

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
            start = sampler.start(example, case.image.shape[:3], PATCH, source.centres(number))
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


def test_threads_give_what_tensorflow_gives(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = Sampler(7, 5, 0.5)
    options: dict[str, Any] = {"patch": PATCH, "batch_size": 2, "workers": 3}
    train = take(6, train_batches(source, sampler, **options))
    center = list(center_batches(source, **options))
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    for a, b in zip(train, take(6, train_batches(source, sampler, **options)), strict=True):
        same(a, b)
        assert {k: v.dtype for k, v in a.items()} == {k: v.dtype for k, v in b.items()}
    for a, b in zip(center, list(center_batches(source, **options)), strict=True):
        same(a, b)


def test_an_interrupted_run_goes_on_on_another_number_of_processes(source: Source) -> None:
    """Steps 0-2 by one process, 3-4 by four, 5-7 by two: the global sequence is that of one process throughout."""
    sampler = make_sampler(
        7,
        source,
        ATTRIBUTES,
        foreground=0.6,
        labels={},
        sampling={"classes": "balanced", "balance": "site", "weight": ""},
    )
    whole = take(8, train_batches(source, sampler, patch=PATCH, batch_size=4))
    found: list[dict] = []
    for processes, steps in ((1, 3), (4, 2), (2, 3)):
        parts = [
            take(
                steps,
                train_batches(
                    source, sampler, patch=PATCH, batch_size=4, first_step=len(found), process=p, processes=processes,
                    workers=1 + p,
                ),
            )
            for p in range(processes)
        ]  # fmt: skip
        found += [{k: np.concatenate([part[i][k] for part in parts]) for k in whole[0]} for i in range(steps)]
    for a, b in zip(whole, found, strict=True):
        same(a, b)
    assert np.concatenate([b["example"] for b in found]).tolist() == list(range(32))


ATTRIBUTES = [Case(str(i), str(i), {}, {}, {"site": "ab"[i > 0], "often": str(i / 2)}) for i in range(5)]
PRESENT = {"classes": "present", "balance": "", "weight": ""}


def sampler_of(source: Source, **sampling: Any) -> Sampler:
    return make_sampler(
        0, source, ATTRIBUTES, foreground=0.5, sampling={**PRESENT, **sampling}, labels={"one": 1, "many": 300, "no": 7}
    )


def test_what_the_sampling_keys_mean(source: Source) -> None:
    assert sampler_of(source) == Sampler(0, 5, 0.5)
    balanced = sampler_of(source, classes="balanced")
    assert balanced.holders == {("a", 1): (0, 2), ("a", 2): (1,), ("a", 300): (4,)}
    assert set(balanced.classes.values()) == {1.0}
    assert sampler_of(source, classes={"one": 2, "many": 1.0}).classes == {("a", 1): 2.0, ("a", 300): 1.0}
    assert sampler_of(source, balance="site").weights == (1.0, 0.25, 0.25, 0.25, 0.25)
    assert sampler_of(source, weight="often").weights == (0.0, 0.5, 1.0, 1.5, 2.0)
    assert sampler_of(source, weight="often", balance="site").weights == (0.0, 0.1, 0.2, 0.3, 0.4)
    # A case of no weight is not taken for a class it has either.
    assert sampler_of(source, weight="often", classes="balanced").holders[("a", 1)] == (2,)
    wide = make_sampler(0, source, ATTRIBUTES, foreground=0.0, sampling={**PRESENT, "classes": "balanced"}, labels={})
    assert wide == Sampler(0, 5, 0.0)
    for wrong, message in {
        "classes": [("balance", "'present', 'balanced' or a table"), ({"onne": 1}, "did you mean 'one'"),
                    ({"one": -1}, "needs a number, 0 or more"), ({"no": 1}, "no label with a weight is in")],
        "balance": [("sight", "case 0 has no such attribute; did you mean 'site'")],
        "weight": [("site", "case 0 has 'a'; needs a number")],
    }.items():  # fmt: skip
        for value, text in message:
            with pytest.raises(UserError, match=text):
                sampler_of(source, **{wrong: value})


def with_findings(count: int, ignore: int | None = None) -> Source:
    """A case of a mask with labels 1 and 2, and of findings numbered 1 to `count`, a voxel each."""
    numbered = np.zeros((16, 16, 16), np.uint16)
    for i in range(count):
        numbered[2 * i + 1, 3, 3] = i + 1
    mask = np.zeros((16, 16, 16), np.uint8)
    mask[8, 8, 8], mask[9, 9, 9] = 1, 2
    case = SimpleNamespace(
        image=np.zeros((16, 16, 16, 1), np.float32),
        targets={"organ": mask, "nodules": numbered},
        values={"nodules": np.array([[2 * i + 1, 3, 3, 1, 1, 1, 2] for i in range(count)], np.float32)},
        geometry=SimpleNamespace(spacing=(1.0, 1.0, 1.0), affine=np.eye(4)),
        present=(True,),
    )
    return Source([case], ("organ", "nodules"), ignore)


def test_a_patch_is_centred_on_every_finding() -> None:
    """Instance masks hold numbers of rows: the value that is ignored in masks is none of theirs."""
    source = with_findings(4, ignore=3)
    assert sorted(int(p[0]) for voxels in source.centres(0, ("nodules", 1)) for p in voxels) == [1, 3, 5, 7]


def test_classes_to_sample_are_labels_of_masks_and_tasks_of_findings() -> None:
    source, cases = with_findings(2), [Case("0", "0", {}, {}, {})]

    def classes(wanted: Any) -> Any:
        sampling = {**PRESENT, "classes": wanted}
        labels = {"organ": 1, "tumour": 2}
        return make_sampler(0, source, cases, foreground=0.5, sampling=sampling, labels=labels).classes

    assert classes({"organ": 2.0}) == {("organ", 1): 2.0}
    assert classes({"tumour": 2.0, "nodules": 1.0}) == {("organ", 2): 2.0, ("nodules", 1): 1.0}
    with pytest.raises(UserError, match="no label or task of findings 'nodule'; did you mean 'nodules'"):
        classes({"nodule": 1.0})
    with pytest.raises(UserError, match="no label with a weight is in the training cases"):
        classes({"organ": 0.0})


def test_a_balanced_patch_holds_its_class(source: Source) -> None:
    sampler = make_sampler(
        3, source, ATTRIBUTES, foreground=1.0, sampling={**PRESENT, "classes": "balanced"}, labels={}
    )
    counts = {1: 0, 2: 0, 300: 0}
    for batch in take(20, train_batches(source, sampler, patch=PATCH, batch_size=3)):
        for example, target in zip(batch["example"], batch["a/target"], strict=True):
            _, key = sampler.draw(int(example))
            assert key is not None
            assert (target == key[1]).any()
            counts[key[1]] += 1
    assert set(counts.values()) == {20}


def test_whole_volumes_in_buckets(source: Source) -> None:
    shapes = [case.image.shape[:3] for case in source.cases]
    buckets = bucket_shapes(shapes, 2, (2, 2, 2))
    sampler = make_sampler(
        3, source, ATTRIBUTES, foreground=0.5, sampling=PRESENT, labels={}, buckets=buckets, batch_size=2
    )
    options: dict[str, Any] = {"patch": buckets, "batch_size": 2}
    seen, batches = set(), take(10, train_batches(source, sampler, **options))
    for batch in batches:
        seen.add(batch["image"].shape[1:4])
        assert batch["a/target"].shape == batch["image"].shape[:4]
        for example, image in zip(batch["example"], batch["image"], strict=True):
            case = source.cases[sampler.case(int(example))]
            room = np.asarray(image.shape[:3]) - case.image.shape[:3]
            assert (room >= 0).all()
            np.testing.assert_array_equal(image, cut(case.image, -room // 2, image.shape[:3]))
    assert seen == set(buckets)
    halves = [take(10, train_batches(source, sampler, **options, process=p, processes=2)) for p in range(2)]
    for a, b, whole in zip(*halves, batches, strict=True):
        same({k: np.concatenate([a[k], b[k]]) for k in a}, whole)


def test_every_kind_of_target() -> None:
    def case(number: int, **values: Any) -> Any:
        mask = np.zeros((6, 6, 6), np.uint16)
        rows = values.get("nodules", np.zeros((0, 8)))
        mask.reshape(-1)[: 2 * len(rows)] = np.repeat(np.arange(len(rows)), 2) + 1
        return SimpleNamespace(
            image=np.full((6, 6, 6, 1), number, np.float32),
            targets={"nodules": mask} if "nodules" in values else {},
            values={k: np.asarray(v) for k, v in values.items()},
            geometry=SimpleNamespace(spacing=(1.0, 1.0, 1.0), affine=np.eye(4)),
            present=(True,),
        )

    rows = np.arange(16, dtype=np.float32).reshape(2, 8)
    cases = [
        case(0, grade=np.int32(2), age=np.float32(61.5), ratings=np.float32([1, np.nan]), nodules=rows),
        case(1, grade=np.int32(1), nodules=rows[:0]),
        case(2),
    ]
    source = Source(cases, ("grade", "age", "ratings", "nodules"))
    (batch,) = center_batches(source, patch=(4, 4, 4), batch_size=3)
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items() if "/" in k} == {
        "grade/target": ((3,), "int32"), "grade/mask": ((3,), "bool"),
        "age/target": ((3,), "float32"), "age/mask": ((3,), "bool"),
        "ratings/target": ((3, 2), "float32"), "ratings/mask": ((3,), "bool"),
        "nodules/target": ((3, 4, 4, 4), "uint16"), "nodules/table": ((3, 2, 8), "float32"),
        "nodules/mask": ((3,), "bool"),
    }  # fmt: skip
    assert batch["grade/target"].tolist() == [2, 1, 0]
    assert batch["grade/mask"].tolist() == [True, True, False]
    assert batch["age/target"].tolist() == [61.5, 0, 0]
    assert batch["age/mask"].tolist() == [True, False, False]
    np.testing.assert_array_equal(batch["ratings/target"], [[1, np.nan], [0, 0], [0, 0]])
    assert batch["nodules/mask"].tolist() == [True, True, False]
    np.testing.assert_array_equal(batch["nodules/table"], [rows, np.full((2, 8), np.nan), np.full((2, 8), np.nan)])
    # Findings are one class to the sampler, though each is as likely as another.
    assert {key: len(points) for key, points in source.points[0].items()} == {("nodules", 1): 2}
    assert source.points[1] == {}


@pytest.mark.parametrize("threads", [False, True])
def test_what_goes_wrong_in_a_row_is_told(source: Source, threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if threads:
        monkeypatch.setitem(sys.modules, "tensorflow", None)
    real = Source.row

    def row(self: Source, number: int, start: Any, patch: Any, example: int, valid: bool, out: Any = None) -> Any:
        if example == 5:
            raise UserError("case 2: damaged")
        return real(self, number, start, patch, example, valid, out)

    monkeypatch.setattr(Source, "row", row)
    batches = train_batches(source, Sampler(7, 5, 0.5), patch=PATCH, batch_size=2)
    assert [next(batches)["example"].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(UserError, match="^case 2: damaged$"):
        next(batches)


def test_memory_stays_flat(source: Source) -> None:
    """Thousands of batches: what a batch takes is given back."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for threads in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            if threads:
                patch.setitem(sys.modules, "tensorflow", None)
            batches = train_batches(source, Sampler(7, 5, 0.5), patch=(16, 16, 16), batch_size=4, workers=2)
            pieces = []
            for _ in range(4):
                for batch in islice(batches, 500):
                    assert batch["image"].nbytes == 4 * 16**3 * 2 * 4
                pieces.append(resident())
        # 500 batches hold 65 MB.
        assert pieces[-1] - pieces[0] < 8 << 20, pieces


@pytest.mark.parametrize("threads", [False, True])
def test_memory_is_used_again_and_never_while_a_batch_is_held(
    source: Source, threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if threads:
        monkeypatch.setitem(sys.modules, "tensorflow", None)
    sampler = Sampler(3, 5, 0.5)
    make = lambda: train_batches(source, sampler, patch=PATCH, batch_size=2, workers=2)  # noqa: E731
    expected = [{key: value.copy() for key, value in batch.items()} for batch in islice(make(), 30)]
    kept, places = [], set()
    for step, batch in enumerate(islice(make(), 30)):
        assert batch["image"].ctypes.data % 64 == 0
        places.add(batch["image"].ctypes.data)
        if step % 3 == 0:
            kept.append((step, batch["image"][1, 2:], jax.device_put(batch["image"])))
    assert len(places) < 30 - 5
    for step, part, on_device in kept:
        np.testing.assert_array_equal(part, expected[step]["image"][1, 2:])
        np.testing.assert_array_equal(on_device, expected[step]["image"])


def test_arrays_of_every_size_can_be_had() -> None:
    buffers = pipeline._Buffers()
    for shape, dtype in (((), np.bool_), ((0, 3), np.float32), ((5,), np.int64), ((2, 3, 4), np.uint8)):
        array = buffers.empty(shape, np.dtype(dtype))
        assert array.shape == shape
        assert array.dtype == dtype
        array[...] = 1


_LEFT_OPEN = """
import sys
sys.path[:0] = [{tests!r}]
if {threads}:
    sys.modules["tensorflow"] = None
from types import SimpleNamespace
import numpy as np
from medjax.data.pipeline import Source, train_batches
from medjax.data.sampler import Sampler

case = SimpleNamespace(image=np.zeros((40, 40, 40, 4), np.float32), targets={{"a": np.ones((40, 40, 40), np.uint8)}},
                       geometry=SimpleNamespace(spacing=(1.0, 1.0, 1.0)), present=(True,) * 4)
batches = train_batches(Source([case], ("a",)), Sampler(0, 1, 0.5), patch=(32, 32, 32), batch_size=4)
for _ in range(5):
    next(batches)
print("read", flush=True)
"""


@pytest.mark.parametrize("threads", [False, True])
def test_a_program_that_leaves_batches_unread_ends(threads: bool) -> None:
    program = _LEFT_OPEN.format(threads=threads, tests=os.path.dirname(__file__))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")
