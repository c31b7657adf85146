"""A prepared case as one file: an array_record file with one `tf.train.Example`, and JSON beside it that says where its
arrays lie, so that a part of an array is read without the rest.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import errno
import hashlib
import json
import math
import os
import sys
import threading
import time
import uuid
import weakref
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medjax.data import preprocess
from medjax.data.cases import Case
from medjax.data.sampler import foreground_points
from medjax.errors import UserError, warn_once
from medjax.ops import native

FORMAT = 2  # of a case's file and of the JSON beside it
# array_record's files (riegeli's records format): blocks of 64 KiB that begin with a header; the rest is one stream.
_BLOCK, _HEADER = 1 << 16, 24
_PAYLOAD = _BLOCK - _HEADER
_OPTIONS = "group_size:1,uncompressed"  # voxels are read in place, and compressing floats costs more than it saves
_LARGEST = (1 << 31) - (1 << 20)  # bytes a protocol buffer may have, less room for the small features
_MAPPED = 1 / 8  # of the machine's memory: what mapped files may show as resident
_PIECES = 512  # pairs of buffers a preadv call takes (IOV_MAX is 1024)
_STALE_SECONDS = 24 * 3600  # a case is written in minutes: what is older has no writer any more
_NO_MASK = (2, 2, 2)  # shape of a mask that is not there; TFDS's numpy reader trips over empty arrays

MASKS = ("mask", "findings")
"""Kinds of targets (`medjax.data.targets.KINDS`) that have a mask."""


# ------------------------------------------------------------------------------------------------------------- reading


class _Damaged(Exception):
    """A case's file is gone, shorter than it was, or holds other bytes."""


class Record:
    """A case's file: bytes of its Example, each block compared with its checksum when first touched."""

    def __init__(self, path: Path, about: Mapping[str, Any], rebuild: Callable[[], Mapping[str, Any]] | None) -> None:
        self.path, self._rebuild, self._lock = path, rebuild, threading.Lock()
        self._arrays = about["arrays"]
        self._file: _Mapped | None = None
        self._take(about)

    def _take(self, about: Mapping[str, Any]) -> None:
        self._start = int(about["start"])
        self._sums = np.frombuffer(base64.b64decode(about["blocks"]), "<u4")
        self._checked = bytearray(len(self._sums))

    def read(self, first: int, strides: Sequence[int], sizes: Sequence[int], out: np.ndarray) -> None:
        """Fills the contiguous `out` [*sizes, ...]: entry (i, j) from byte first + i · strides[0] + j · strides[1] on.

        A damaged file is mended once.
        """
        checked = self._checked
        try:
            self._read(first, strides, sizes, out)
        except _Damaged as error:
            self._mend(str(error), checked)
            try:
                self._read(first, strides, sizes, out)
            except _Damaged as again:
                raise UserError(f"{self.path}: {again}, again after it was prepared anew; check the disk") from None

    def _read(self, first: int, strides: Sequence[int], sizes: Sequence[int], out: np.ndarray) -> None:
        run = out.nbytes // math.prod(sizes)
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                # Steps far apart, and in each of them rows: what one or two axes are not, is a single step.
                outer, inner = [(0, 1)] * (2 - len(sizes)) + list(zip(strides, sizes, strict=True))
                reach = (inner[1] - 1) * inner[0] + run
                self._check(fd, [(first + i * outer[0], reach) for i in range(outer[1])])
                self._gather(fd, first, outer, inner, run, out)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EIO, errno.ESTALE):
                raise _Damaged(error.strerror) from None
            raise UserError(f"{self.path}: cannot be read: {error.strerror}") from None

    def _gather(
        self, fd: int, first: int, outer: tuple[int, int], inner: tuple[int, int], run: int, out: np.ndarray
    ) -> None:
        native_gather = native.function("medjax_gather")  # without it several times slower: Python's lock and copies
        at = self._start + first
        if native_gather is not None and (mapped := self._mapped(fd)) is not None:
            lengths = (mapped.size, _BLOCK, _HEADER, at, outer[1], outer[0], inner[1], inner[0], run)
            target = ctypes.c_void_p(out.ctypes.data)
            failed = native_gather(fd, ctypes.c_void_p(mapped.address), *map(ctypes.c_int64, lengths), target)
            if failed < 0:
                raise _Damaged("shorter than it was")
            if failed:
                raise OSError(failed, os.strerror(failed))
            _resident.add(mapped, outer[1] * (inner[1] * inner[0] + run))
            return
        rows = out.reshape(outer[1], inner[1], run // out.itemsize)
        if inner[0] == run or inner[1] == 1:
            for i in range(outer[1]):
                self._stream(fd, at + i * outer[0], memoryview(rows[i].data).cast("B"))
            return
        # What lies between the rows is read along with them.
        between = np.empty((inner[1] * inner[0] // out.itemsize), out.dtype)
        wide = between.reshape(inner[1], -1)
        for i in range(outer[1]):
            length = (inner[1] - 1) * inner[0] + run
            self._stream(fd, at + i * outer[0], memoryview(between.data).cast("B")[:length])
            rows[i] = wide[:, : rows.shape[2]]

    def _mapped(self, fd: int) -> _Mapped | None:
        """The file in memory: the same until it is another file; None where it cannot be had."""
        status = os.fstat(fd)
        which = status.st_dev, status.st_ino, status.st_size
        mapped = self._file  # by now another thread may have put another one there
        if mapped is None or mapped.which != which:
            mapped = _Mapped(fd, which)
            self._file = mapped
        return mapped if mapped.address else None

    def _stream(self, fd: int, first: int, out: memoryview) -> None:
        """Fills `out` from a place in the stream on."""
        block, within = divmod(first, _PAYLOAD)
        at, done = block * _BLOCK + _HEADER + within, 0
        header = bytearray(_HEADER)
        while done < len(out):
            buffers: list[Any] = []
            begun = done
            while done < len(out) and len(buffers) < 2 * _PIECES:
                size = min(_PAYLOAD - within, len(out) - done)
                buffers += (out[done : done + size], header)
                done, within = done + size, 0
            buffers.pop()  # the header after the last piece
            size = done - begun + _HEADER * (len(buffers) // 2)
            if os.preadv(fd, buffers, at) != size:
                raise _Damaged("shorter than it was")
            at += size + _HEADER

    def _check(self, fd: int, parts: Sequence[tuple[int, int]]) -> None:
        """Compares the blocks of these parts (first byte, length; in order) that no one has compared yet."""

        def blocks(first: int, length: int) -> tuple[int, int]:
            return (self._start + first) // _PAYLOAD, (self._start + first + length - 1) // _PAYLOAD + 1

        if self._checked.find(0, blocks(*parts[0])[0], blocks(*parts[-1])[1]) == -1:
            return
        for part in parts:
            for number in range(*blocks(*part)):
                if not self._checked[number]:
                    data = os.pread(fd, _BLOCK, number * _BLOCK)
                    if zlib.crc32(data) != self._sums[number]:
                        raise _Damaged(f"damaged (block {number} of {len(self._sums)} is not what was written)")
                    self._checked[number] = 1

    def _mend(self, what: str, seen: bytearray) -> None:
        with self._lock:
            if self._checked is not seen:  # another thread has just mended it
                return
            if self._rebuild is None:
                raise UserError(f"{self.path}: {what}. Delete it and prepare the store again where the sources are.")
            warn_once(f"{self.path}: {what}; the case is prepared anew")
            about = self._rebuild()
            if about["arrays"] != self._arrays:
                raise UserError(f"{self.path}: {what}, and prepared anew it is not what it was; give the command again")
            self._take(about)


class _Mapped:
    """A file in this process's address space.

    What was read stays in the page tables, so that the next patch there costs no page faults, until all files together
    hold more than `_MAPPED` of the machine's memory. These pages are the kernel's cache: they count as resident, but it
    takes them back where it needs them.
    """

    def __init__(self, fd: int, which: tuple[int, int, int]) -> None:
        self.which, self.size = which, which[-1]
        map_file: Any = native.function("medjax_map")
        self._call = {name: native.function(f"medjax_{name}") for name in ("forget", "unmap")}
        self.address: int | None = map_file(fd, ctypes.c_int64(self.size)) if map_file and self.size else None

    def forget(self) -> None:
        self._do("forget")

    def _do(self, what: str) -> None:
        if call := self._call[what]:
            call(ctypes.c_void_p(self.address), ctypes.c_int64(self.size))

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if getattr(self, "address", None) and not ending():
            _resident.set(self, 0)
            self._do("unmap")


class _Resident:
    """What the mapped files hold of the memory, at most."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._lock = threading.RLock()  # a file may go while its own thread is in here
        self._files: OrderedDict[int, tuple[weakref.ref[_Mapped], int]] = OrderedDict()  # longest untouched first

    def set(self, file: _Mapped, size: int) -> int:
        with self._lock:
            before = self._files.pop(id(file), (None, 0))[1]
            if size:
                self._files[id(file)] = weakref.ref(file), size
            self._held += size - before
            return before

    def add(self, file: _Mapped, count: int) -> None:
        """Up to `count` bytes more have been read of a file."""
        with self._lock:
            self.set(file, min(file.size, self.set(file, 0) + count))
            while self._held > self._most and len(self._files) > 1:
                _, (oldest, size) = self._files.popitem(last=False)
                self._held -= size
                if (other := oldest()) is not None:
                    other.forget()


_resident = _Resident(int(_MAPPED * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))


class Stored:
    """An array in the store, read when it is sliced; `numpy.asarray` reads all of it.

    Attributes:
      shape, ndim: of the array. dtype: of what slicing gives (`kept` is the type on disk).
    """

    def __init__(self, record: Record, at: int, shape: Sequence[int], kept: str, dtype: str) -> None:
        self._record, self._at, self._kept = record, at, np.dtype(kept)
        self.shape, self.ndim, self.dtype = tuple(shape), len(shape), np.dtype(dtype)

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[()], dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """As numpy's; slices of step 1 along the first three axes read what they name, anything else reads it all."""
        cuts = index if isinstance(index, tuple) else (index,)
        if len(cuts) > 3 or any(not isinstance(c, slice) or c.step not in (None, 1) for c in cuts):
            return self[()][index]
        sizes = [len(range(*c.indices(n))) for c, n in zip(cuts, self.shape, strict=False)]
        out = np.empty((*sizes, *self.shape[len(cuts) :]), self._kept)
        self.read_into(cuts, out)
        return out.astype(self.dtype, copy=False)

    def read_into(self, cuts: Sequence[slice], out: np.ndarray) -> None:
        """Fills `out`, of the shape of these slices; without a copy in between if it is contiguous and of the type on
        disk."""
        bounds = [c.indices(n)[:2] for c, n in zip(cuts, self.shape, strict=False)]
        if out.dtype != self._kept or not out.flags.c_contiguous:
            out[...] = self[tuple(cuts)]
        elif out.size:
            self._fill(out, [start for start, _ in bounds], [stop - start for start, stop in bounds])

    def _fill(self, out: np.ndarray, starts: list[int], sizes: list[int]) -> None:
        # Axes that are taken whole lie together with what follows.
        while sizes and sizes[-1] == self.shape[len(sizes) - 1]:
            starts.pop()
            sizes.pop()
        strides = [self._kept.itemsize * math.prod(self.shape[i + 1 :]) for i in range(len(starts))]
        first = self._at + sum(s * n for s, n in zip(starts, strides, strict=True))
        # The last axis that is cut lies together with what follows.
        self._record.read(first, strides[:-1], sizes[:-1], out)


# ------------------------------------------------------------------------------------------------------------- writing


def write(path: Path, record: bytes, about: dict[str, Any]) -> None:
    """Writes a case's Example and the JSON beside it; both are renamed into place when whole."""
    beside = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.part")
    try:
        _write_record(beside, record)
        about["start"], about["blocks"], about["size"] = _sums(beside, record)
        body = json.dumps(about)
        write_text(path.with_suffix(".json"), json.dumps({"digest": digest_of(body.encode()), "about": body}))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def remove_stale(pool: Path) -> None:
    """Removes what killed builds left among the cases; what is younger may be another's, at work without locks."""
    for left in pool.glob("*/.*.part"):
        with contextlib.suppress(OSError):  # another has removed it, or may write here and this process may not
            if time.time() - left.stat().st_mtime > _STALE_SECONDS:
                left.unlink()


def _write_record(path: Path, record: bytes) -> None:
    try:
        from array_record.python import array_record_module
    except ImportError:
        raise UserError("data.store: a store is written with array_record: pip install array_record") from None
    try:
        writer = array_record_module.ArrayRecordWriter(str(path), _OPTIONS)
        writer.write(record)
        writer.close()
    except RuntimeError as error:
        # "write() failed: No space left on device; writing <path>; at byte ..."
        raise no_room(path.parent, str(error).partition(";")[0].rpartition(": ")[2]) from None


def write_text(path: Path, text: str) -> None:
    # A name of its own: processes of one number may write from several machines.
    beside = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.part")
    try:
        beside.write_text(text)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _sums(path: Path, record: bytes) -> tuple[int, str, int]:
    """Reads a file back: (where in its stream the record begins, its blocks' checksums, its size)."""
    sums, at = [], 0
    with path.open("rb") as file:
        block = file.read(_BLOCK)
        start = block.find(record[:64]) - _HEADER
        if start < 0:
            raise UserError(f"{path}: array_record has laid the file out in a way this medjax does not know; report it")
        within = _HEADER + start
        while block:
            sums.append(zlib.crc32(block))
            if at < len(record):
                here = record[at : at + len(block) - within]
                if here != block[within : within + len(here)]:
                    raise UserError(f"{path}: the disk does not give back what was written; check it")
                at, within = at + len(here), _HEADER
            block = file.read(_BLOCK)
    return start, _text(np.asarray(sums, "<u4").tobytes()), path.stat().st_size


def encode(case: Case, plan: preprocess.Plan, prepared: preprocess.Prepared) -> tuple[bytes, dict[str, Any]]:
    """A case as a serialised `tf.train.Example`, and where its arrays lie in it.

    The encoding is protocol buffers' wire format: Example {1: Features {1: map<string, Feature>}}, a Feature being {1:
    BytesList {1: bytes}} or {3: Int64List {1: packed varints}}. Arrays are raw little-endian bytes in C order (TFDS's
    `Encoding.BYTES`); one with several axes of unknown length has its shape beside it, as TFDS has it. A TFDS
    example has every feature: what the case has no target for is there as a mask of another shape, class -1 or NaN, and
    `known` says so.
    """
    pieces: list[bytes | memoryview] = []
    arrays: dict[str, dict[str, Any]] = {}

    def put(name: str, value: bytes | memoryview) -> None:
        pieces.extend((_head(name, len(value)), value))

    def array(name: str, value: np.ndarray, kept: Any, dynamic: bool) -> None:
        raw = np.asarray(value, np.dtype(kept).newbyteorder("<"), order="C")
        put(f"{name}/value" if dynamic else name, memoryview(raw.data).cast("B") if raw.size else b"")
        at = sum(map(len, pieces)) - raw.nbytes
        arrays[name] = {"at": at, "shape": raw.shape, "kept": raw.dtype.str, "dtype": value.dtype.str}
        if dynamic:
            pieces.append(_int_feature(f"{name}/shape", raw.shape))

    array("image", prepared.image, np.float32, True)
    for task in plan.kinds:
        known = task in prepared.targets or task in prepared.values
        array(f"known/{task}", np.asarray(known, np.uint8), np.uint8, False)
    points: dict[str, list[tuple[int, int, int]]] = {}
    for task, kind in plan.kinds.items():
        if kind in MASKS:
            known = task in prepared.targets
            mask = prepared.targets[task] if known else np.zeros(_NO_MASK, np.uint8)
            array(f"targets/{task}", mask, mask_dtype(plan, task), True)
            found = foreground_points(mask, ignore=None if kind == "findings" else plan.ignore)  # numbers of rows
            firsts = np.cumsum([0, *map(len, found.values())])
            points[task] = [(v, int(first), len(p)) for (v, p), first in zip(found.items(), firsts, strict=False)]
            array(f"points/{task}", np.concatenate([np.zeros((0, 3), np.int32), *found.values()]), np.int32, False)
        if kind != "mask":
            value = prepared.values.get(task, _unknown(kind))
            if value.size == 0:  # no findings
                value = np.full((1, max(1, value.shape[1])), np.nan, np.float32)
            array(f"values/{task}", value, value.dtype, value.ndim > 1)
    array("spacing", np.asarray(prepared.geometry.spacing, np.float32), np.float32, False)
    array("present", np.asarray(prepared.present, np.uint8), np.uint8, False)
    for name, text in (("id", case.id), ("group", case.group), ("geometry", prepared.geometry.to_json())):
        put(name, text.encode())
    length = sum(map(len, pieces))
    if length > _LARGEST:
        raise UserError(
            f"case {case.id}: {length / 1e9:.2f} GB when prepared, but a record of the store holds 2.1 GB. Choose a "
            "coarser data.preprocess.spacing, or train without data.store"
        )
    head = b"\x0a" + _varint(length)
    for place in arrays.values():
        place["at"] += len(head)
    about = {
        "id": case.id,
        "group": case.group,
        "arrays": arrays,
        "targets": [task for task in plan.kinds if task in prepared.targets],
        "points": points,
        "values": {t: [v.dtype.str, v.shape, _text(v.tobytes())] for t, v in prepared.values.items()},
        "geometry": prepared.geometry.to_json(),
        "present": prepared.present,
        "scale": prepared.scale,
    }
    return b"".join((head, *pieces)), about


def mask_dtype(plan: preprocess.Plan, task: str) -> np.dtype:
    """Type of a task's masks on disk, the same for every case of the dataset."""
    if plan.kinds[task] == "findings":
        return np.dtype(np.uint16)
    largest = max(plan.declared, default=0) if plan.declared else np.iinfo(np.int32).max
    return np.dtype(next(d for d in (np.uint8, np.uint16, np.int32) if largest <= np.iinfo(d).max))


def _unknown(kind: str) -> np.ndarray:
    """What stands for a target that a case lacks."""
    if kind == "class":
        return np.asarray(-1, np.int32)
    return np.full({"number": (), "vector": (1,), "findings": (1, 1)}[kind], np.nan, np.float32)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes((*out, number))


def _head(name: str, size: int) -> bytes:
    """What comes before the `size` bytes of a feature that is one byte string."""
    value = b"\x0a" + _varint(size)
    values = b"\x0a" + _varint(len(value) + size)
    return _entry(name, len(values) + len(value) + size) + values + value


def _int_feature(name: str, numbers: Sequence[int]) -> bytes:
    packed = b"".join(map(_varint, numbers))
    value = b"\x0a" + _varint(len(packed)) + packed
    values = b"\x1a" + _varint(len(value)) + value
    return _entry(name, len(values)) + values


def _entry(name: str, size: int) -> bytes:
    """What comes before a feature of `size` bytes in the map of features."""
    key = b"\x0a" + _varint(len(name.encode())) + name.encode()
    feature = b"\x12" + _varint(size)
    return b"\x0a" + _varint(len(key) + len(feature) + size) + key + feature


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def array_of(dtype: str, shape: Sequence[int], data: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(data), dtype).reshape(shape)


def digest_of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def about_if_whole(path: Path) -> dict[str, Any] | None:
    """What the JSON beside a case says, if it is what was written and the case has the size it should."""
    try:
        table = json.loads(path.with_suffix(".json").read_text())
        if digest_of(table["about"].encode()) != table["digest"]:
            return None
        about: dict[str, Any] = json.loads(table["about"])
        return about if path.stat().st_size == about["size"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def is_whole(path: Path) -> bool:
    """Whether a case's file is what was written, all its blocks read and compared."""
    if (about := about_if_whole(path)) is None:
        return False
    try:
        with path.open("rb") as file:
            sums = np.frombuffer(base64.b64decode(about["blocks"]), "<u4")
            return all(zlib.crc32(file.read(_BLOCK)) == checksum for checksum in sums)
    except OSError:
        return False


def no_room(folder: Path, reason: str) -> UserError:
    return UserError(
        f"{folder}: cannot write the store: {reason}. The finished cases are kept; free some room (or choose another "
        "data.store) and give the same command again"
    )
