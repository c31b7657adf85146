"""The prepared store: preprocessed cases on disk, read patch by patch, never prepared twice and never served stale.

One file a case: an array_record file that holds a single uncompressed `tf.train.Example` with the voxels in C order,
so that the same bytes serve TFDS (`tfds.builder_from_directory`) as whole volumes and the sampler as patches: a patch
is read where it lies, without the rest of the volume. Files are named by what they were made from (contents of the
source files, plan, code of the preparation), are written beside and renamed, and each block of 64 KiB carries a
checksum that is compared when a process first touches it.

    <store>/cases/3f/3f2a....array_record   the Example; .json beside it: where its arrays lie, checksums, geometry
    <store>/sources.json                    digests of source files by size and times: the cheap check
    <store>/<cohort>/<key>/1.0.0/           a TFDS dataset of the splits: links to the cases, and TFDS's metadata

Reading needs neither TensorFlow nor array_record; writing needs array_record, and the metadata TFDS.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import math
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medjax.data import hashes, nifti, preprocess, records
from medjax.data.cases import Case
from medjax.data.dataset import each
from medjax.errors import UserError, warn_once
from medjax.ops.native.cpus import usable_cpus

_VERSION = "1.0.0"
# Modules that read which files there are, and no voxels: what they find is in the cases, and so in the files' names.
_NO_VOXELS = ("medjax", "medjax.errors", *(f"medjax.data.{m}" for m in ("folders", "joins", "readers", "tables")))


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True, eq=False)
class StoredCase:
    """A prepared case in the store; stands where `preprocess.Prepared` does.

    Attributes:
      id, group: of the case.
      image: [X, Y, Z, C] float32. targets: task -> mask [X, Y, Z]. values: task -> array; small, in memory.
      geometry, present, scale: see `preprocess.Prepared`.
      points: task -> value -> voxels int32 [n, 3], see `sampler.foreground_points`.
    """

    id: str
    group: str
    image: records.Stored
    targets: Mapping[str, records.Stored]
    values: Mapping[str, np.ndarray]
    geometry: preprocess.Geometry
    present: tuple[bool, ...]
    scale: tuple[float, ...]
    points: Mapping[str, Mapping[int, records.Stored]]


def _open_case(path: Path, about: Mapping[str, Any], rebuild: Callable[[], Mapping[str, Any]] | None) -> StoredCase:
    record = records.Record(path, about, rebuild)

    def array(name: str) -> records.Stored:
        return records.Stored(record, *(about["arrays"][name][k] for k in ("at", "shape", "kept", "dtype")))

    def points(task: str) -> dict[int, records.Stored]:
        at = about["arrays"][f"points/{task}"]["at"]
        return {
            int(value): records.Stored(record, at + 12 * first, (count, 3), "<i4", "<i4")
            for value, first, count in about["points"][task]
        }

    known = about["targets"]
    return StoredCase(
        id=about["id"],
        group=about["group"],
        image=array("image"),
        targets={task: array(f"targets/{task}") for task in known},
        values={task: records.array_of(*value) for task, value in about["values"].items()},
        geometry=preprocess.Geometry.from_json(about["geometry"]),
        present=tuple(about["present"]),
        scale=tuple(about["scale"]),
        points={task: points(task) for task in known},
    )


def load(folder: str | os.PathLike[str]) -> dict[str, list[StoredCase]]:
    """The cases of a dataset in a store, split by split; needs neither the source files nor TensorFlow.

    Args:
      folder: `<store>/<cohort>/<key>/1.0.0`.
    """
    folder = Path(folder)
    try:
        table = json.loads((folder / "medjax.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no dataset of a store ({error}); give <store>/<cohort>/<key>/{_VERSION}") from None
    pool = folder.parents[2] / "cases"
    out: dict[str, list[StoredCase]] = {}
    for split, keys in table["splits"].items():
        out[split] = []
        for key in keys:
            path = _file(pool, key)
            out[split].append(_open_case(path, _require_about(path), None))
    return out


# ------------------------------------------------------------------------------------------------------------- writing


def prepare(
    folder: str | os.PathLike[str],
    name: str,
    plan: preprocess.Plan,
    splits: Mapping[str, Sequence[Case]],
    workers: int = 0,
    progress: Callable[[str, int], Any] | None = None,
) -> tuple[dict[str, list[StoredCase]], Path]:
    """Brings the store up to date with the cases of `splits` and opens them.

    What is there and still true is kept; only new or changed cases are prepared, on threads, one case a thread at a
    time. A build that was killed goes on where it was; several at once share the work.

    Args:
      folder: the store; made if need be. name: of the cohort, for the TFDS dataset.
      workers: threads; 0: one a usable CPU.
      progress: `(label, total)` -> an object with `update(done)` and `close()`.

    Returns:
      `(cases, dataset)`: split name -> its cases, in order; and the folder `tfds.builder_from_directory` reads.

    Raises:
      UserError: anything wrong with a case's files, naming them; no room on the disk.
    """
    builder = _Builder(Path(folder).expanduser(), plan, workers or usable_cpus(), progress or _Silent)
    opened, keys = builder.build({split: tuple(cases) for split, cases in splits.items()})
    preprocess.compare_intensities({c.id: c.scale for cases in opened.values() for c in cases}, plan.modalities)
    return opened, _publish(builder.folder, name, plan, keys)


class _Silent:
    """Progress nobody watches."""

    def __init__(self, label: str, total: int) -> None:
        del label, total

    def update(self, done: int) -> None:
        del done

    def close(self) -> None:
        pass


class _Builder:
    """Prepares what a store lacks. One a call of `prepare`."""

    def __init__(self, folder: Path, plan: preprocess.Plan, workers: int, progress: Callable[[str, int], Any]) -> None:
        self.folder, self.pool = folder, folder / "cases"
        self._plan, self._workers, self._progress = plan, workers, progress
        self._context = json.dumps([records.FORMAT, _plan_key(plan), code_version()], sort_keys=True)
        with _said_of(folder):
            self.pool.mkdir(parents=True, exist_ok=True)
        self._sources = _Sources(folder / "sources.json")

    def build(self, splits: Mapping[str, Sequence[Case]]) -> tuple[dict[str, list[StoredCase]], dict[str, list[str]]]:
        """Prepares the missing cases; (split -> opened cases, split -> their keys)."""
        cases = [case for members in splits.values() for case in members]
        keys = dict(zip(map(id, cases), self._each("checking source files", self._key, cases), strict=True))
        self._sources.save()
        records.remove_stale(self.pool)
        absent = [case for case in cases if records.about_if_whole(_file(self.pool, keys[id(case)])) is None]
        if absent:
            self._check_room(absent)

            def build(case: Case, wait: bool = False) -> bool:
                return self._build(case, keys[id(case)], wait)

            done = self._each("preparing cases", build, absent)
            # What another process was at: finished by now, or ours to do.
            if late := [case for case, there in zip(absent, done, strict=True) if not there]:
                self._each("waiting for cases of another process", functools.partial(build, wait=True), late)
        opened = {split: [self._open(case, keys[id(case)]) for case in members] for split, members in splits.items()}
        return opened, {split: [keys[id(case)] for case in members] for split, members in splits.items()}

    def _each(self, label: str, function: Callable[[Case], Any], cases: Sequence[Case]) -> list[Any]:
        bar = self._progress(label, len(cases))
        done = each(function, cases, self._workers, bar.update)
        bar.close()
        return done

    def _key(self, case: Case) -> str:
        """Name of the case's file: a digest of all it is made from, and nothing else."""
        images = [[modality, self._sources.digest(path)] for modality, path in case.images.items()]
        targets = [
            [task, self._sources.digest(value) if isinstance(value, Path) else repr(value)]
            for task, value in sorted(case.targets.items())
        ]
        text = json.dumps([self._context, case.id, case.group, images, targets])
        return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()

    def _check_room(self, cases: Sequence[Case]) -> None:
        if self._plan.crop is not None:
            return  # the shapes are not known before the images are read
        masks = sum(kind in ("mask", "findings") for kind in self._plan.kinds.values())
        voxels = sum(math.prod(self._plan.prepared_shape(case)) for case in cases)
        need = voxels * (4 * len(self._plan.modalities) + masks)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise UserError(
                f"{self.folder}: no room on the disk: {len(cases)} cases to prepare need about {need / 1e9:.1f} GB, "
                f"{free / 1e9:.1f} GB are free. Free some room or choose another data.store"
            )

    def _open(self, case: Case, key: str) -> StoredCase:
        path = _file(self.pool, key)

        def rebuild() -> Mapping[str, Any]:
            if self._key(case) != key:
                raise UserError(f"{path}: damaged, and case {case.id} has been edited since; give the command again")
            self._build(case, key, wait=True, doubted=True)
            return _require_about(path)

        return _open_case(path, _require_about(path), rebuild)

    def _build(self, case: Case, key: str, wait: bool, doubted: bool = False) -> bool:
        """Prepares and writes a case unless it is there; False if another process is at it and `wait` is False.

        What is there is kept if `doubted` only after all of it has been read: another process may have mended it.
        """
        path = _file(self.pool, key)
        with _said_of(self.folder):
            path.parent.mkdir(exist_ok=True)
            with _locked(path.with_suffix(".lock"), wait) as mine:
                if not mine:
                    return False
                if doubted and not records.is_whole(path):
                    path.unlink(missing_ok=True)
                if records.about_if_whole(path) is None:
                    # The record has its own copy of the prepared case, which is gone by now: two volumes at most.
                    record, about = records.encode(case, self._plan, preprocess.prepare_case(case, self._plan))
                    if self._key(case) != key:
                        raise UserError(f"case {case.id}: its files changed while they were read; start again")
                    records.write(path, record, about)
        return True


# ------------------------------------------------------------------------------------------------ what is there, whole


def _file(pool: Path, key: str) -> Path:
    return pool / key[:2] / f"{key}.array_record"


def _require_about(path: Path) -> dict[str, Any]:
    about = records.about_if_whole(path)
    if about is None:
        raise UserError(f"{path}: missing or damaged; prepare the store again where the sources are")
    return about


@contextlib.contextmanager
def _said_of(folder: Path) -> Iterator[None]:
    """What the disk says, as one message."""
    try:
        yield
    except OSError as error:
        raise records.no_room(folder, error.strerror or str(error)) from error


@contextlib.contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Holds a lock among threads and processes; gives False at once if another has it and `wait` is False.

    A process that dies loses its locks. Where the file system has none, there are none: names are unique and files are
    renamed into place, so that work may be done twice and nothing worse.
    """
    import fcntl

    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(fd)
            yield False
            return
        except OSError:
            break
        with contextlib.suppress(FileNotFoundError):
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                break
        os.close(fd)  # its holder has just removed it: this was a lock on nothing
    try:
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


class _Sources:
    """Digests of source files by content, remembered by path, size, inode and times (the status change time as well,
    which a program that restores a file's modification time cannot restore), once the times lie in the past."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock, self._known = path, threading.Lock(), _json_table(path)
        self._saved, self._new = time.monotonic(), False

    def digest(self, path: Path) -> str:
        """Of a file, of a header and its image, or of a folder of files."""
        try:
            parts = [(file.name, self._file(file)) for file in _files_of(path)]
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}. Correct the path or fetch the file.") from None
        return parts[0][1] if len(parts) == 1 else records.digest_of(repr(parts).encode())

    def _file(self, path: Path) -> str:
        name, status = str(path.absolute()), path.stat()
        mark = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
        known = self._known.get(name)
        if known and known[:-1] == mark:
            return known[-1]
        now = time.time_ns()
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, functools.partial(hashlib.blake2b, digest_size=20)).hexdigest()
        if max(status.st_mtime_ns, status.st_ctime_ns) >= now - hashes.SETTLED_NS:
            return digest  # another edit could still leave the same times
        with self._lock:
            self._known[name], self._new = [*mark, digest], True
            if time.monotonic() - self._saved > 10:
                self._write()
        return digest

    def save(self) -> None:
        with self._lock, _said_of(self._path.parent):
            if self._new:  # a store that lacks nothing may be read-only
                self._write()

    def _write(self) -> None:
        self._known = {**_json_table(self._path), **self._known}  # what another process has learnt meanwhile
        records.write_text(self._path, json.dumps(self._known, indent=0))
        self._saved, self._new = time.monotonic(), False


def _json_table(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return list(nifti.files_of(path))


def _plan_key(plan: preprocess.Plan) -> dict[str, Any]:
    """The part of a plan that a prepared case depends on: the folds of a cohort share their cases."""
    unused = ("median_spacing", "median_shape", "numbered")
    return {k: v for k, v in json.loads(plan.to_json()).items() if k not in unused}


@functools.cache
def code_version() -> str:
    """Digest of the code that prepares a case: what `medjax.data.preprocess` imports of medjax, comments apart."""
    package = Path(__file__).resolve().parents[1]
    found: dict[str, str] = {}
    wanted = ["medjax.data.preprocess"]
    while wanted:
        module = wanted.pop()
        base = package.parent.joinpath(*module.split("."))
        file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        if module in found or module in _NO_VOXELS or not file.is_file():
            continue
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "medjax":
                wanted += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                wanted += [alias.name for alias in node.names if alias.name.split(".")[0] == "medjax"]
            elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = None  # a docstring
        found[module] = ast.dump(tree)
        for source in (*base.glob("*.cc"), *base.glob("*.h")):
            found[f"{module}/{source.name}"] = source.read_text()
    return records.digest_of(json.dumps(found, sort_keys=True).encode())


# ---------------------------------------------------------------------------------------------------------------- TFDS


def _publish(store: Path, name: str, plan: preprocess.Plan, keys: Mapping[str, Sequence[str]]) -> Path:
    """Makes the TFDS dataset of these splits unless it is there; it never changes afterwards. Returns its folder."""
    name = re.sub(r"\W+", "_", name).strip("_").lower() or "cohort"
    text = json.dumps({"splits": keys, "plan": json.loads(plan.to_json())}, indent=1)
    folder = store / name / records.digest_of(text.encode())[:12] / _VERSION
    if (folder / "dataset_info.json").exists():
        return folder
    beside = folder.parent.with_name(f".{folder.parent.name}.{uuid.uuid4().hex}.part")
    with _said_of(store):
        shutil.rmtree(beside, ignore_errors=True)
        try:
            (beside / _VERSION).mkdir(parents=True)
            (beside / _VERSION / "medjax.json").write_text(text)
            for split, members in keys.items():
                for number, key in enumerate(members):
                    link = beside / _VERSION / f"{name}-{split}.array_record-{number:05d}-of-{len(members):05d}"
                    # Relative to where the folder will be: the store may be moved.
                    link.symlink_to(Path("../../../cases") / key[:2] / f"{key}.array_record")
            metadata = _write_metadata(beside / _VERSION, store / "cases", name, plan, keys)
            if metadata and folder.exists():
                shutil.rmtree(folder.parent)  # made where TFDS was not installed
            try:
                os.replace(beside, folder.parent)
            except OSError:
                if not folder.exists():  # made by another process meanwhile: the same
                    raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder


def _write_metadata(
    folder: Path, pool: Path, name: str, plan: preprocess.Plan, keys: Mapping[str, Sequence[str]]
) -> bool:
    """TFDS's own files of a dataset; False, and a note, where TFDS is not installed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        warn_once(f"{folder.parent}: TFDS is not installed, so tfds.load cannot read the store; training can")
        return False
    tensor, text = functools.partial(tfds.features.Tensor, encoding="bytes"), tfds.features.Text
    features: dict[str, Any] = {
        "id": text(),
        "group": text(),
        "geometry": text(doc="medjax.data.preprocess.Geometry as JSON: the way back to the file's grid"),
        "image": tensor(shape=(None, None, None, len(plan.modalities)), dtype=np.float32),
        "spacing": tensor(shape=(3,), dtype=np.float32, doc="mm"),
        "present": tensor(shape=(len(plan.modalities),), dtype=np.uint8, doc="which channels are real"),
    }
    for task, kind in plan.kinds.items():
        features.setdefault("known", {})[task] = tensor(shape=(), dtype=np.uint8, doc="whether there is a target")
        if kind in records.MASKS:
            masks = features.setdefault("targets", {})
            masks[task] = tensor(
                shape=(None, None, None), dtype=records.mask_dtype(plan, task), doc="[2, 2, 2]: unknown"
            )
            points = features.setdefault("points", {})
            points[task] = tensor(shape=(None, 3), dtype=np.int32, doc="some labelled voxels of each value")
        if kind != "mask":
            shape = {"class": (), "number": (), "vector": (None,), "findings": (None, None)}[kind]
            values = features.setdefault("values", {})
            values[task] = tensor(shape=shape, dtype=np.int32 if kind == "class" else np.float32)
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=[1] * len(members),
            num_bytes=sum(_file(pool, key).stat().st_size for key in members),
        )
        for split, members in keys.items()
    ]
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=tfds.features.FeaturesDict(features),
        split_infos=splits,
        version=_VERSION,
        check_data=False,
        description=f"Prepared by medjax. Modalities: {', '.join(plan.modalities)}. Labels: {dict(plan.labels)}.",
    )
    return True
