"""Digests remembered between processes: as fast as a look at the directory, and never of a file that has changed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medjax.data import cohort as cohorts
from medjax.data import hashes
from medjax.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEDJAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Reader:
    """Digests that are the files' own text, and which files were read."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, path: Path) -> str:
        self.read.append(path.name)
        return path.read_text()


def tick() -> None:
    """Lets the file system's clock go on: what follows gets other times than what was."""
    time.sleep(0.02)


def look(*files: Path) -> tuple[list[str], list[str]]:
    """(digests, names of the files that were read for them)."""
    reader = Reader()
    return hashes.remembered(reader, files, workers=2), sorted(reader.read)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two files in different folders that count as settled at once."""
    monkeypatch.setattr(hashes, "SETTLED_NS", -(10**9))
    made = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        made.append(tmp_path / name / f"{name}.nii")
        made[-1].write_text(f"voxels of {name}")
    return made


def test_a_second_look_reads_nothing(files: list[Path]) -> None:
    assert look(*files) == (["voxels of a", "voxels of b"], ["a.nii", "b.nii"])
    assert look(*files) == (["voxels of a", "voxels of b"], [])
    assert look(*reversed(files)) == (["voxels of b", "voxels of a"], [])
    assert look() == ([], [])


def test_any_change_is_seen(files: list[Path]) -> None:
    a, b = files
    look(*files)
    tick()
    a.write_text("voxels of A")  # of the same size
    assert look(*files) == (["voxels of A", "voxels of b"], ["a.nii"])
    # The same size and the time of modification set back, as `cp -p` and `rsync -t` do.
    kept = os.stat(a)
    tick()
    a.write_text("voxels of Z")
    os.utime(a, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    assert os.stat(a).st_mtime_ns == kept.st_mtime_ns
    assert look(*files)[0][0] == "voxels of Z"
    # Another file moved to its place, with the times and the size of the first.
    tick()
    other = a.with_name("other")
    other.write_text("voxels of c")
    kept = os.stat(a)
    os.utime(other, ns=(kept.st_atime_ns, kept.st_mtime_ns))
    os.replace(other, a)
    assert look(*files)[0][0] == "voxels of c"
    # A link that points elsewhere.
    b.unlink()
    b.symlink_to(a)
    assert look(*files)[0] == ["voxels of c", "voxels of c"]


def test_what_changed_just_now_is_not_remembered(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "SETTLED_NS", 60 * 10**9)
    assert look(*files)[1] == ["a.nii", "b.nii"]
    assert look(*files)[1] == ["a.nii", "b.nii"]


def test_what_changes_while_it_is_read_is_not_remembered(files: list[Path]) -> None:
    def slow(path: Path) -> str:
        text = path.read_text()
        time.sleep(0.01)
        path.write_text("changed meanwhile")
        return text

    assert hashes.remembered(slow, files[:1]) == ["voxels of a"]
    assert look(files[0]) == (["changed meanwhile"], ["a.nii"])


def test_the_voxels_of_a_pair_lie_in_the_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "SETTLED_NS", -(10**9))
    header, voxels = tmp_path / "x.hdr", tmp_path / "x.img"
    header.write_text("header")
    voxels.write_text("1")
    assert look(header)[1] == ["x.hdr"]
    assert look(header)[1] == []
    tick()
    voxels.write_text("2")
    assert look(header)[1] == ["x.hdr"]


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"root": "/elsewhere", "files": {}}', '{"root": 1, "files": []}'])
def test_a_damaged_cache_is_made_anew(files: list[Path], cache: Path, damage: str) -> None:
    look(*files)
    (store,) = cache.rglob("*.json")
    store.write_text(damage)
    assert look(*files)[1] == ["a.nii", "b.nii"]
    assert look(*files)[1] == []
    assert set(json.loads(store.read_text())["files"]) == {str(f) for f in files}


def test_files_that_are_gone_are_forgotten(files: list[Path], cache: Path) -> None:
    look(*files)
    files[1].unlink()
    third = files[0].with_name("c.nii")
    third.write_text("c")
    (files[1].with_name("d.nii")).write_text("d")
    look(files[0], third, files[1].with_name("d.nii"))
    (store,) = cache.rglob("*.json")
    assert {Path(name).name for name in json.loads(store.read_text())["files"]} == {"a.nii", "c.nii", "d.nii"}


def test_another_reader_reads_anew(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    look(*files)
    monkeypatch.setattr(hashes, "_readers", lambda: "another")
    assert look(*files)[1] == ["a.nii", "b.nii"]


def test_a_cache_that_cannot_be_written_is_said_and_does_no_harm(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEDJAX_CACHE", str(tmp_path / "file"))
    assert look(*files)[0] == ["voxels of a", "voxels of b"]
    assert "MEDJAX_CACHE" in capsys.readouterr().err


def test_splits_still_find_twins_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "SETTLED_NS", -(10**9))
    rng, lines = np.random.default_rng(0), ["id,image,split"]
    for i, name in enumerate("abc"):
        nib.save(nib.Nifti1Image(rng.normal(size=(4, 4, 4)).astype(np.float32), np.eye(4)), tmp_path / f"{name}.nii.gz")
        lines.append(f"{name},{name}.nii.gz,{('train', 'val')[i % 2]}")
    (tmp_path / "cases.csv").write_text("\n".join(lines) + "\n")
    cohort = cohorts.from_manifest(tmp_path / "cases.csv", {"MR": "image"}, split="split")
    read: list[str] = []
    true = cohorts.nifti.read
    monkeypatch.setattr(cohorts.nifti, "read", lambda path: (read.append(str(path)), true(path))[1])
    cohorts.split(cohort, {})
    assert len(read) == 3
    cohorts._content_hash.cache_clear()  # as a new process
    cohorts.split(cohort, {})
    assert len(read) == 3
    tick()
    (tmp_path / "b.nii.gz").write_bytes((tmp_path / "a.nii.gz").read_bytes())
    with pytest.raises(UserError, match="identical voxels"):
        cohorts.split(cohort, {})
    assert len(read) == 4  # of the three files the changed one alone is read
    cohorts._content_hash.cache_clear()
    with pytest.raises(UserError, match="identical voxels"):
        cohorts.split(cohort, {})
    assert len(read) == 4
