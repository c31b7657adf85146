"""The store: the voxels of memory bit for bit, nothing prepared twice, nothing stale or damaged served."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_rooms import BLOCK
from test_train import state_bytes

from medjax import config as config_lib
from medjax import models, tasks
from medjax import train as spine
from medjax.data import cohort as cohorts
from medjax.data import dataset, preprocess, records, sampler, store
from medjax.data.cases import Finding
from medjax.errors import UserError
from medjax.ops import native

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> cohorts.Cohort:
    return cohorts.from_msd(tiny.write_cohort(tmp_path_factory.mktemp("spheres")), "spheres")


@pytest.fixture(scope="module")
def plan(cohort: cohorts.Cohort) -> preprocess.Plan:
    return preprocess.fit({"spacing": (1.5, 2.0, 2.5)}, cohort, cohort.cases)


@pytest.fixture(scope="module")
def memory(cohort: cohorts.Cohort, plan: preprocess.Plan) -> list[preprocess.Prepared]:
    return dataset.prepare(plan, cohort.cases)


@pytest.fixture
def own(cohort: cohorts.Cohort, tmp_path: Path) -> tuple[cohorts.Case, ...]:
    """The cases in files of the test's own."""
    shutil.copytree(cohort.root, tmp_path / "own")
    return cohorts.from_msd(tmp_path / "own", "spheres").cases


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the cases that are prepared."""
    seen: list[str] = []
    real = preprocess.prepare_case
    monkeypatch.setattr(preprocess, "prepare_case", lambda case, plan: seen.append(case.id) or real(case, plan))
    return seen


def build(folder: Path, plan: preprocess.Plan, cases: Any, **more: Any) -> list[store.StoredCase]:
    return store.prepare(folder, "Spheres", plan, {"all": cases}, **more)[0]["all"]


def same(a: Any, b: Any) -> None:
    """A stored case against a prepared one."""
    assert (a.geometry, a.present, a.scale) == (b.geometry, b.present, b.scale)
    for mine, yours in [(a.image, b.image), *((a.targets[t], b.targets[t]) for t in b.targets)]:
        assert mine.dtype == yours.dtype
        assert mine.shape == yours.shape
        np.testing.assert_array_equal(np.asarray(mine), yours)
    assert set(a.targets) == set(b.targets)
    assert set(a.values) == set(b.values)
    for task, value in b.values.items():
        assert a.values[task].dtype == value.dtype
        np.testing.assert_array_equal(a.values[task], value)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "cases").rglob("*.array_record"))


def leftovers(folder: Path) -> list[Path]:
    return [f for f in folder.rglob("*") if f.name.endswith((".part", ".lock", ".tmp"))]


@pytest.mark.parametrize("way", ["read", "mapped", "not to be mapped"])
def test_slices_are_those_of_memory(
    way: str,
    cohort: cohorts.Cohort,
    plan: preprocess.Plan,
    memory: list,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MEDJAX_NATIVE", "0" if way == "read" else "1")
    monkeypatch.setattr(records, "_PIECES", 1)  # several calls a run
    if way == "not to be mapped":  # as on some network file systems
        real = native.function
        monkeypatch.setattr(records.native, "function", lambda n: (lambda *_: None) if n == "medjax_map" else real(n))
    rng = np.random.default_rng(0)
    for a, b in zip(build(tmp_path, plan, cohort.cases), memory, strict=True):
        same(a, b)
        for mine, yours in ((a.image, b.image), (a.targets["spheres"], b.targets["spheres"])):
            for _ in range(40):
                ends = [sorted(rng.integers(0, n + 1, 2)) for n in yours.shape[:3]]
                index = tuple(slice(*e) if rng.random() < 0.7 else slice(None) for e in ends)
                np.testing.assert_array_equal(mine[index], yours[index])
                start = rng.integers(-9, 20, 3)
                np.testing.assert_array_equal(sampler.cut(mine, start, (8, 9, 7)), sampler.cut(yours, start, (8, 9, 7)))
            np.testing.assert_array_equal(mine[1:4, 2], yours[1:4, 2])  # what is no slice reads it all
            np.testing.assert_array_equal(mine[1:4], yours[1:4])
        for value, voxels in sampler.foreground_points(b.targets["spheres"]).items():
            np.testing.assert_array_equal(a.points["spheres"][value], voxels)
            np.testing.assert_array_equal(a.points["spheres"][value][3:4], voxels[3:4])


@pytest.fixture
def cube(tmp_path: Path) -> store.StoredCase:
    """A case of 96³ voxels in the store."""
    shape, rng = (96, 96, 96), np.random.default_rng(0)
    (tmp_path / "imagesTr").mkdir()
    tiny.nib.save(tiny.nib.Nifti1Image(rng.random(shape, np.float32), np.eye(4)), tmp_path / "imagesTr" / "a.nii")
    table = {"name": "one", "modality": {"0": "MR"}, "labels": {}, "training": [{"image": "imagesTr/a.nii"}]}
    (tmp_path / "dataset.json").write_text(json.dumps(table))
    cases = cohorts.from_msd(tmp_path).cases
    plan = preprocess.fit({"normalize": "none"}, cohorts.from_msd(tmp_path), cases)
    (case,) = build(tmp_path / "store", plan, cases)
    return case


def test_a_patch_reads_about_that_patch(cube: store.StoredCase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDJAX_NATIVE", "0")
    if not Path("/proc/self/io").exists():
        pytest.skip("what a process reads is counted by Linux alone")

    def read() -> int:
        return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])

    cube.image[0:1, 0:1, 0:1]  # what is loaded at the first read
    small = 20_000  # the counter's own text, the JSON beside...
    rows = 16 * 16 * 96 * 4  # a row is read whole
    before = read()
    for _ in range(2):
        cube.image[40:56, 40:56, 40:56]
    # Twice the rows, and once the blocks of 64 KiB they lie in, to be checked.
    assert read() - before <= 2 * rows * 1.001 + 16 * 2 * 65536 + small < 0.9 * 96**3 * 4
    before = read()
    cube.image[40:56, 40:56, 40:56]
    assert read() - before <= rows * 1.001 + small


@pytest.fixture
def kernels() -> None:
    if native.function("medjax_gather") is None:
        pytest.skip("the native kernels are off")


def in_memory(path: Path, fresh: bool = False) -> int:
    """Bytes of a file that the kernel has in its cache, after it was asked to drop them (`fresh`)."""
    size = path.stat().st_size
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    with path.open("rb") as file:
        if fresh:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        data = ctypes.c_void_p(libc.mmap(None, ctypes.c_size_t(size), 1, 1, file.fileno(), ctypes.c_long(0)))
    pages = np.zeros(-(-size // 4096), np.uint8)
    assert not libc.mincore(data, ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data))
    libc.munmap(data, ctypes.c_size_t(size))
    return int((pages & 1).sum()) * 4096


@pytest.mark.usefixtures("kernels")
def test_a_patch_brings_about_that_patch_into_memory(cube: store.StoredCase) -> None:
    path, whole = cube.image._record.path, 4 * 96**3
    expected = cube.image[()]  # and every block has been checked
    cube.image._record._file = None  # a page in use is not dropped
    if in_memory(path, fresh=True) > whole // 2:
        pytest.skip("this file system keeps its files in memory")
    np.testing.assert_array_equal(cube.image[40:56, 40:56, 40:56], expected[40:56, 40:56, 40:56])
    assert in_memory(path) < 0.5 * whole  # 16 planes of 96, and what the disk reads ahead


@pytest.mark.usefixtures("kernels")
def test_mapped_files_keep_to_their_share(
    own: tuple, plan: preprocess.Plan, memory: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgotten: list[records._Mapped] = []
    forget = records._Mapped.forget
    monkeypatch.setattr(records._Mapped, "forget", lambda file: (forgotten.append(file), forget(file)))
    cases = build(tmp_path / "store", plan, own)
    share = records._Resident(int(2.5 * cases[0].image._record.path.stat().st_size))
    monkeypatch.setattr(records, "_resident", share)
    for _ in range(2):
        for case, expected in zip(cases, memory, strict=True):
            for _ in range(3):
                np.testing.assert_array_equal(case.image[()], expected.image)
            assert share._held <= share._most
    assert len(forgotten) >= 2 * len(cases) - 3
    before = share._held
    del forgotten[:], case, cases
    gc.collect()
    assert before > 0
    assert not share._held
    assert not share._files


_CUT_WHILE_READ = """
import ctypes, os, sys, threading
import numpy as np
from medjax.ops import native

gather, mapped = native.function("medjax_gather"), native.function("medjax_map")
size = 64 * 65536
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.truncate(fd, size)
file = ctypes.c_void_p(mapped(fd, ctypes.c_int64(size)))
out = np.empty(60 * 65536, np.uint8)
numbers = [ctypes.c_int64(n) for n in (size, 65536, 24, 0, 1, 0, 1, 0, out.nbytes)]
go = lambda: gather(fd, file, *numbers, ctypes.c_void_p(out.ctypes.data))
assert go() == 0
os.truncate(fd, 8192)
import errno
assert go() == errno.EIO
threads = [threading.Thread(target=go) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
os.truncate(fd, size)
assert go() == 0
print("alive", flush=True)
os.truncate(fd, 0)
ctypes.string_at(file, 1)  # not in a gather: the process ends as it would have without us
"""


@pytest.mark.usefixtures("kernels")
def test_a_file_cut_while_it_is_copied_is_an_error_and_no_crash(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CUT_WHILE_READ, str(tmp_path / "file")], capture_output=True, text=True
    )
    assert done.stdout == "alive\n", done.stderr
    assert done.returncode == -signal.SIGBUS


def test_nothing_is_prepared_twice(
    own: tuple, plan: preprocess.Plan, memory: list, tmp_path: Path, calls: list[str]
) -> None:
    folder = tmp_path / "store"
    build(folder, plan, own[:5])
    assert sorted(calls) == [c.id for c in own[:5]]
    calls.clear()
    build(folder, plan, own[:5])
    build(folder, replace(plan, median_shape=(9, 9, 9), median_spacing=(9.0, 9.0, 9.0)), own[:3])
    assert calls == []
    for a, b in zip(build(folder, plan, own), memory, strict=True):
        same(a, b)
    assert sorted(calls) == [c.id for c in own[5:]]
    calls.clear()
    # The same contents elsewhere are found again; a case under another plan is not the same.
    shutil.copytree(tmp_path / "own", tmp_path / "moved")
    build(folder, plan, cohorts.from_msd(tmp_path / "moved", "spheres").cases)
    assert calls == []
    build(folder, replace(plan, orientation="LPS"), own[:1])
    assert calls == [own[0].id]
    assert not leftovers(folder)


@pytest.mark.parametrize("what", ["image", "mask"])
def test_an_edited_source_is_never_served_stale(
    what: str, own: tuple, plan: preprocess.Plan, tmp_path: Path, calls: list[str]
) -> None:
    build(tmp_path / "store", plan, own)
    calls.clear()
    path = next(iter(own[2].images.values())) if what == "image" else own[2].targets["spheres"]
    before = path.stat()
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[-4000:] = np.frombuffer(data[-4000:], "<f4")[::-1].tobytes() if what == "image" else bytes(4000)
    edited = gzip.compress(bytes(data))
    path.write_bytes(edited)
    # As an editor that keeps the times would leave it.
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    found = build(tmp_path / "store", plan, own)
    assert calls == [own[2].id]
    same(found[2], preprocess.prepare_case(own[2], plan))


def test_files_of_this_very_moment_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.nii"
    file.write_bytes(b"one")
    sources = store._Sources(tmp_path / "sources.json")
    first, status = sources.digest(file), file.stat()
    monkeypatch.setattr(Path, "stat", lambda *_, **__: status)  # a clock of coarse ticks
    file.write_bytes(b"two")
    assert sources.digest(file) != first
    sources.save()
    assert not os.path.exists(tmp_path / "sources.json")
    monkeypatch.setattr(store.hashes, "SETTLED_NS", -(10**9))
    second = sources.digest(file)
    sources.save()
    again = store._Sources(tmp_path / "sources.json")
    monkeypatch.setattr(Path, "open", None)  # remembered
    assert again.digest(file) == second


def test_other_code_prepares_anew(
    own: tuple, plan: preprocess.Plan, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path / "store", plan, own[:2])
    monkeypatch.setattr(store, "code_version", lambda: "another")
    build(tmp_path / "store", plan, own[:2])
    assert len(calls) == 4


def test_the_code_version_sees_code_and_not_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(REPO / "medjax", tmp_path / "medjax", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(store, "__file__", str(tmp_path / "medjax" / "data" / "store.py"))

    def version() -> str:
        store.code_version.cache_clear()
        return store.code_version()

    first = version()
    for name, changes in (
        ("data/preprocess.py", True), ("data/nifti.py", True), ("data/volume.py", True), ("ops/resample.py", True),
        ("train.py", False), ("errors.py", False), ("data/readers.py", False), ("data/cases.py", True),
    ):  # fmt: skip
        file = tmp_path / "medjax" / name
        text = file.read_text()
        file.write_text(text + "\n# a comment\n")
        assert version() == first
        file.write_text(text + "\nSOMETHING = 1\n")
        assert (version() != first) == changes, name
        file.write_text(text)
    store.code_version.cache_clear()


def test_a_killed_build_goes_on(own: tuple, plan: preprocess.Plan, memory: list, tmp_path: Path, calls: list) -> None:
    folder = tmp_path / "store"
    code = f"""
import os, signal, sys
from pathlib import Path
from medjax.data import cohort, preprocess, records, store
cases = cohort.from_msd({str(tmp_path / "own")!r}, "spheres").cases
plan = preprocess.Plan.from_json({plan.to_json()!r})
real, n = records._sums, 0
def sums(*arguments):
    global n
    n += 1
    if n == 4:
        os.kill(os.getpid(), signal.SIGKILL)  # between the writing of a file and its renaming
    return real(*arguments)
records._sums = sums
store.prepare({str(folder)!r}, "Spheres", plan, {{"all": cases}}, workers=1)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert len(files(folder)) == 3
    assert [f.suffix for f in leftovers(folder)].count(".part") == 1
    for a, b in zip(build(folder, plan, own), memory, strict=True):
        same(a, b)
    assert sorted(calls) == [c.id for c in own[3:]]
    # The case may be another's, who is at it still; after a day it is not.
    (part,) = leftovers(folder)
    os.utime(part, (0, time.time() - 23 * 3600))
    build(folder, plan, own)
    assert leftovers(folder) == [part]
    os.utime(part, (0, time.time() - 25 * 3600))
    build(folder, plan, own)
    assert not leftovers(folder)


def test_where_nothing_is_locked_no_writer_loses_its_file(
    own: tuple, plan: preprocess.Plan, memory: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    folder, real = tmp_path / "store", records._sums

    def slow(beside: Path, record: bytes) -> Any:
        monkeypatch.setattr(records, "_sums", real)
        build(folder, plan, own[:1])  # by another machine, while this one has written the same case and not renamed it
        return real(beside, record)

    monkeypatch.setattr(records, "_sums", slow)
    same(build(folder, plan, own[:1])[0], memory[0])
    assert not leftovers(folder)


def test_two_builds_at_once_share_the_work(
    own: tuple, plan: preprocess.Plan, memory: list, tmp_path: Path, calls: list[str]
) -> None:
    found: list[Any] = [None, None]
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        found[i] = build(tmp_path / "store", plan, own, workers=2)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == [c.id for c in own]
    for cases in found:
        for a, b in zip(cases, memory, strict=True):
            same(a, b)
    assert not leftovers(tmp_path / "store")


def damage(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(3000)
        byte = file.read(1)
        file.seek(3000)
        file.write(bytes([byte[0] ^ 4]))


HARM = {
    "a bit": damage,
    "cut short": lambda path: os.truncate(path, 3000),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("when", ["before", "while it is read"])
@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_file_is_made_anew(
    harm: str, when: str, own: tuple, plan: preprocess.Plan, memory: list, tmp_path: Path, calls: list[str]
) -> None:
    cases = build(tmp_path / "store", plan, own)
    bad = cases[1].image._record.path
    if when == "while it is read":
        assert cases[0].image[:2].any()
    HARM[harm](bad)
    if when == "before":
        cases = build(tmp_path / "store", plan, own)
    calls.clear()
    for a, b in zip(cases, memory, strict=True):
        same(a, b)
    assert calls == ([] if when == "before" and harm != "a bit" else [own[1].id])
    for a, b in zip(build(tmp_path / "store", plan, own), memory, strict=True):
        same(a, b)


def test_what_another_process_has_mended_is_kept(
    own: tuple, plan: preprocess.Plan, memory: list, tmp_path: Path, calls: list[str]
) -> None:
    mine, other = build(tmp_path / "store", plan, own[:1]), build(tmp_path / "store", plan, own[:1])
    path = mine[0].image._record.path
    damage(path)
    same(other[0], memory[0])
    calls.clear()
    mended = path.stat().st_ino, path.stat().st_mtime_ns
    # This one found the damage before, and comes to mend it only now.
    record = mine[0].image._record
    record._mend("damaged", record._checked)
    same(mine[0], memory[0])
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == mended
    assert not calls


def test_a_damaged_index_is_made_anew(own: tuple, plan: preprocess.Plan, memory: list, tmp_path: Path) -> None:
    build(tmp_path / "store", plan, own)
    a, b, c = (path.with_suffix(".json") for path in files(tmp_path / "store")[:3])
    a.write_text(a.read_text().replace('\\"at\\": ', '\\"at\\": 1', 1))
    b.write_text("")
    c.unlink()
    (tmp_path / "store" / "sources.json").write_text("[1")
    for x, y in zip(build(tmp_path / "store", plan, own), memory, strict=True):
        same(x, y)


def test_a_store_that_lacks_nothing_is_not_written_to(own: tuple, plan: preprocess.Plan, tmp_path: Path) -> None:
    build(tmp_path / "store", plan, own)
    before = {f: f.lstat().st_mtime_ns for f in (tmp_path / "store").rglob("*")}
    build(tmp_path / "store", plan, own)
    assert {f: f.lstat().st_mtime_ns for f in (tmp_path / "store").rglob("*")} == before


def test_damage_without_the_sources_is_told(own: tuple, plan: preprocess.Plan, memory: list, tmp_path: Path) -> None:
    _, folder = store.prepare(tmp_path / "store", "Spheres", plan, {"train": own[:6], "val": own[6:]})
    shutil.rmtree(tmp_path / "own")
    shutil.move(tmp_path / "store", tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere" / folder.relative_to(tmp_path / "store")
    found = store.load(folder)
    assert [len(v) for v in found.values()] == [6, 2]
    for a, b in zip([*found["train"], *found["val"]], memory, strict=True):
        same(a, b)
    path = found["val"][0].image._record.path
    damage(path)
    with pytest.raises(UserError, match=rf"{path.name}: damaged \(block 0 of 2 .*Delete it and prepare"):
        np.asarray(store.load(folder)["val"][0].image)
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name}: missing or damaged"):
        store.load(folder)
    with pytest.raises(UserError, match="no dataset of a store"):
        store.load(tmp_path)


def test_a_file_that_cannot_be_opened_is_kept(
    own: tuple, plan: preprocess.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (case,) = build(tmp_path / "store", plan, own[:1])

    def refuse(*_: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match="cannot be read: Too many open files"):
        np.asarray(case.image)
    assert len(files(tmp_path / "store")) == 1


def test_a_source_that_changes_while_it_is_read(
    own: tuple, plan: preprocess.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = preprocess.prepare_case

    def edits(case: Any, plan: Any) -> Any:
        done = real(case, plan)
        path = next(iter(case.images.values()))
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 1))
        return done

    monkeypatch.setattr(preprocess, "prepare_case", edits)
    with pytest.raises(UserError, match="case case0: its files changed while they were read"):
        build(tmp_path / "store", plan, own[:1])
    assert not files(tmp_path / "store")


@contextlib.contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: what a full disk is to a writer, without filling one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_ends_in_one_message(
    own: tuple, plan: preprocess.Plan, tmp_path: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"
    build(folder, plan, own[:2])
    with files_up_to(100_000), pytest.raises(UserError) as caught:
        build(folder, plan, own)
    assert "cannot write the store: File too large" in str(caught.value)
    assert "The finished cases are kept" in str(caught.value)
    assert len(files(folder)) == 2
    assert not leftovers(folder)
    usage = shutil.disk_usage(folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        with pytest.raises(UserError, match=r"no room on the disk: 6 cases .* 0\.0 GB are"):
            build(folder, plan, own)
    calls.clear()
    build(folder, plan, own)
    assert sorted(calls) == [c.id for c in own[2:]]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the store"):
        build(tmp_path / "file", plan, own)


def test_a_wrong_case_is_named_and_the_others_are_kept(own: tuple, plan: preprocess.Plan, tmp_path: Path) -> None:
    path = next(iter(own[3].images.values()))
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(UserError, match=path.name):
        build(tmp_path / "store", plan, own, workers=1)
    assert 3 <= len(files(tmp_path / "store")) < 8
    with pytest.raises(UserError, match="nowhere.nii: cannot be read"):
        build(tmp_path / "store", plan, [replace(own[0], images={"MRI": tmp_path / "nowhere.nii"})])


@pytest.fixture(scope="module")
def mixed(cohort: cohorts.Cohort) -> cohorts.Cohort:
    """Targets of every kind, each missing somewhere."""
    targets: list[dict[str, Any]] = [{} for _ in cohort.cases]
    for i, case in enumerate(cohort.cases):
        targets[i] = {
            "spheres": case.targets["spheres"],
            "grade": i % 3,
            "age": 50.0 + i,
            "ratings": (1.0, float("nan"), float(i)),
            "nodules": tuple(
                Finding((12.0 + 6 * k, 20.0, 20.0), (5.0, 5.0, 5.0), 1, {"calcified": float(k)}) for k in range(i % 3)
            ),
        }
        del targets[i][("spheres", "grade", "age", "ratings", "nodules")[i % 5]]
    cases = tuple(replace(c, targets=t) for c, t in zip(cohort.cases, targets, strict=True))
    return replace(cohort, cases=cases)


def test_tfds_reads_it(mixed: cohorts.Cohort, tmp_path: Path) -> None:
    import tensorflow_datasets as tfds

    plan = preprocess.fit({"spacing": (2.0, 2.0, 2.0)}, mixed, mixed.cases)
    expected = dataset.prepare(plan, mixed.cases)
    splits = {"train": mixed.cases[:6], "val": mixed.cases[6:]}
    opened, folder = store.prepare(tmp_path, "My cohort (v2)", plan, splits)
    for a, b in zip([*opened["train"], *opened["val"]], expected, strict=True):
        same(a, b)
    assert folder.parts[-3] == "my_cohort_v2"
    builder = tfds.builder_from_directory(folder)
    assert builder.info.splits["train"].num_examples == 6
    found = [*builder.as_data_source("train"), *builder.as_data_source("val")]
    again = tfds.data_source(f"my_cohort_v2/{folder.parent.name}", data_dir=str(tmp_path), split="val")
    assert again[1]["id"] == found[-1]["id"] == b"case7"
    for case, a, b in zip(mixed.cases, found, expected, strict=True):
        assert a["id"].decode() == case.id
        np.testing.assert_array_equal(a["image"], b.image)
        np.testing.assert_array_equal(a["spacing"], np.float32(b.geometry.spacing))
        assert preprocess.Geometry.from_json(a["geometry"].decode()) == b.geometry
        assert a["present"].tolist() == list(b.present)
        for task in ("spheres", "nodules"):
            np.testing.assert_array_equal(a["targets"][task], b.targets.get(task, np.zeros((2, 2, 2))))
        voxels = a["points"]["spheres"]
        assert a["targets"]["spheres"][tuple(voxels.T)].all()
        unknown = {"grade": -1, "age": np.nan, "ratings": [np.nan], "nodules": [[np.nan]]}
        for task, none in unknown.items():
            expected_value = b.values.get(task, none)
            if np.size(expected_value) == 0:  # looked, and found none
                expected_value = np.full((1, 8), np.nan)
            np.testing.assert_array_equal(a["values"][task], expected_value)
            assert a["known"][task] == (task in case.targets)
    # Another set of cases is another dataset; the same one is there already.
    assert store.prepare(tmp_path, "My cohort (v2)", plan, splits)[1] == folder
    assert store.prepare(tmp_path, "My cohort (v2)", plan, {"train": mixed.cases})[1] != folder


def test_what_is_ignored_in_masks_is_no_number_of_a_finding(mixed: cohorts.Cohort, tmp_path: Path) -> None:
    plan = replace(preprocess.fit({"spacing": (4.0, 4.0, 4.0)}, mixed, mixed.cases), ignore=2)
    (case,) = build(tmp_path, plan, mixed.cases[2:3])
    assert sorted(case.points["nodules"]) == [1, 2]


def test_reading_needs_no_tensorflow(cohort: cohorts.Cohort, plan: preprocess.Plan, tmp_path: Path) -> None:
    _, folder = store.prepare(tmp_path / "a", "Spheres", plan, {"train": cohort.cases})
    code = BLOCK.replace("'nilearn'", "'nilearn', 'jax', 'array_record'") + (
        "from itertools import islice\nimport numpy as np\nfrom medjax.data import pipeline, sampler, store\n"
        f"source = pipeline.Source(store.load({str(folder)!r})['train'], ('spheres',))\n"
        "batches = pipeline.train_batches(source, sampler.Sampler(3, 8), patch=(8, 8, 8), batch_size=4, workers=3)\n"
        "for b in islice(batches, 5): print(b['image'].sum(dtype=np.float64), b['spheres/target'].sum())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from itertools import islice

    from medjax.data import pipeline

    source = pipeline.Source(store.load(folder)["train"], ("spheres",))
    batches = pipeline.train_batches(source, sampler.Sampler(3, 8), patch=(8, 8, 8), batch_size=4)
    lines = [f"{b['image'].sum(dtype=np.float64)} {b['spheres/target'].sum()}" for b in islice(batches, 5)]
    assert done.stdout.splitlines() == lines


def test_writing_without_tfds_is_told_and_caught_up(own: tuple, plan: preprocess.Plan, tmp_path: Path) -> None:
    code = BLOCK + (
        "from medjax.data import cohort, preprocess, store\n"
        f"cases = cohort.from_msd({str(tmp_path / 'own')!r}, 'spheres').cases\n"
        f"plan = preprocess.Plan.from_json({plan.to_json()!r})\n"
        f"print(store.prepare({str(tmp_path / 'store')!r}, 'Spheres', plan, {{'all': cases}})[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "TFDS is not installed" in done.stderr
    folder = Path(done.stdout.strip())
    assert len(store.load(folder)["all"]) == 8
    assert not (folder / "features.json").exists()
    build(tmp_path / "store", plan, own)
    assert (folder / "features.json").exists()
    assert len(list(folder.glob("*.array_record-*"))) == 8


def test_progress_is_shown(own: tuple, plan: preprocess.Plan, tmp_path: Path) -> None:
    said: list[Any] = []

    class Bar:
        def __init__(self, label: str, total: int) -> None:
            said.append((label, total))

        def update(self, done: int) -> None:
            said.append(done)

        def close(self) -> None:
            said.append("end")

    build(tmp_path / "store", plan, own[:2], progress=Bar)
    assert said == [
        ("checking source files", 2), 1, 2, "end", ("preparing cases", 2), 1, 2, "end",
    ]  # fmt: skip


def trained(recipe: Path, workdir: Path, *more: str) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """(metrics but the timing, every array of the checkpoint) of a short run."""
    options = {"model": models.options, "tasks": tasks.options}
    config = config_lib.load(str(recipe), ("train.total=3 steps", *more), lambda room, kind: options[room](kind))
    workdir.mkdir()
    spine.train(config, workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timing = ("patches_per_s", "waiting")
    return [{k: v for k, v in row.items() if not k.endswith(timing)} for row in rows], state_bytes(workdir)


def test_training_from_the_store_is_training_from_memory(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.write_recipe(tmp_path / "tiny.py", tiny.write_cohort(tmp_path / "cohort"))
    memory = trained(recipe, tmp_path / "memory")
    key = f"data.store={tmp_path / 'store'}"
    assert trained(recipe, tmp_path / "one", key) == memory
    assert f"store       {tmp_path / 'store' / 'spheres'}" in capsys.readouterr().out
    assert len(files(tmp_path / "store")) == 8
    # The next run prepares nothing; with other workers it is still the same.
    monkeypatch.setattr(preprocess, "prepare_case", None)
    assert trained(recipe, tmp_path / "two", key, "data.workers=3") == memory


def test_training_on_whole_volumes_in_buckets(tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "tiny.py", tiny.write_cohort(tmp_path / "cohort"))
    rows, _ = trained(recipe, tmp_path / "run", "data.buckets=2", "train.total=6 steps")
    assert [row["step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4, 5, 6]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["data"]["patch"] == [22, 20, 20]  # what holds every volume
