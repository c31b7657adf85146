"""Reads and writes NIfTI-1 and NIfTI-2 volumes, and refuses what is not one in words a person can act on.

nibabel parses the header; the voxels are read here, because a damaged gzip stream must be noticed (its checksum stands
at the very end, where a reader that stops after the last voxel never looks) and because a lying header must not
allocate more memory than the file can fill.

Formats: https://nifti.nimh.nih.gov/nifti-1, https://nifti.nimh.nih.gov/pub/dist/doc/nifti2.h and RFC 1952 (gzip).
"""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import logging
import math
import os
import re
import struct
import uuid
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from nibabel.nifti1 import Nifti1Header, Nifti1PairHeader
from nibabel.nifti2 import Nifti2Header, Nifti2PairHeader
from nibabel.spatialimages import HeaderDataError

from medjax.data.volume import Volume, check_affine, check_same_grid, corner_distance, count_nonfinite, shear
from medjax.errors import UserError, warn_once

try:  # the same stream and the same checks at twice the speed, where it is installed
    inflate: Any = importlib.import_module("isal.isal_zlib")
except ImportError:
    inflate = zlib
_INFLATE_ERRORS: tuple[type[Exception], ...] = (zlib.error, inflate.error)

LABEL_TOLERANCE = 1e-3
"""A label value this close to an integer is that integer; scaling factors leave values such as 0.99999997."""

_SLOPE_ROUNDING = 2.0**-22  # of a label's value: float32 slope and float32 result, half a unit in the last place each
_CHUNK = 1 << 16
_PIECE = 1 << 20
_MAX_DEFLATE_RATIO = 1032  # the DEFLATE format cannot expand a byte further (zlib's technical notes)
_LAST_XFORM_CODE = 5  # of the qform and the sform: NIFTI_XFORM_TEMPLATE_OTHER
_EDGES = (5e-3, 100.0)  # mm that a voxel's edge may have where the header names another unit, mostly by mistake
_QFORM_TOLERANCE = 0.05  # voxels that qform and sform may differ by before it is worth a line
_PIXDIM_TOLERANCE = 0.01  # share of an edge that pixdim and sform may differ by: some programs round one of them

_REFUSED_DTYPES = {
    1: "1-bit voxels",
    32: "complex numbers",
    1792: "complex numbers",
    2048: "complex numbers",
    128: "RGB colours (a picture, not intensities)",
    2304: "RGBA colours (a picture, not intensities)",
}
_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer, not the image itself. Fetch it with `git lfs pull`"),
    (b"\x00\x05\x16\x07", "macOS bookkeeping (AppleDouble '._' file), not an image. Delete it; the image is the file "
     "of the same name without '._'"),
    (b"NRRD", "an NRRD file. Convert it to NIfTI (3D Slicer, SimpleITK)"),
    (b"ObjectType", "a MetaImage (.mha/.mhd) file. Convert it to NIfTI (3D Slicer, SimpleITK)"),
    (b"NDims", "a MetaImage (.mha/.mhd) file. Convert it to NIfTI (3D Slicer, SimpleITK)"),
    (b"BZh", "compressed with bzip2. Unpack it and compress with gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd. Unpack it and compress with gzip"),
    (b"\xfd7zXZ", "compressed with xz. Unpack it and compress with gzip"),
    (b"PK\x03\x04", "a zip archive. Unpack it first"),
    (b"\x89HDF", "an HDF5 (or MINC) file. Convert it to NIfTI"),
    (b"CDF\x01", "a MINC file. Convert it to NIfTI (mnc2nii)"),
    (b"\x89PNG", "a PNG picture, not a volume"),
    (b"\xff\xd8\xff", "a JPEG picture, not a volume"),
    (b"<?xml", "an XML file (GIFTI surface?), not a volume"),
    (b"<!DOCTYPE", "a web page, probably saved in place of a download. Download it again"),
    (b"<html", "a web page, probably saved in place of a download. Download it again"),
)  # fmt: skip

_quiet = logging.getLogger("medjax.nibabel")
_quiet.disabled = True  # nibabel's header checks log what is told here in one sentence, with the file's name


def read(path: str | os.PathLike[str]) -> Volume:
    """Reads an image.

    Args:
      path: `.nii`, `.nii.gz`, or either file of a `.hdr`/`.img` pair. Compression is told by content, not by name.

    Returns:
      The volume with intensity scaling applied: as stored where the header scales nothing, else float32 (float64 for
      stored types that float32 cannot hold). [X, Y, Z, 1] becomes [X, Y, Z]; a fourth dimension is channels.
      Oddities that are safe to read (NaN, shear, qform unlike sform, no orientation...) are in `Volume.notes`
      and reported once.

    Raises:
      UserError: naming the file, what is wrong with it and the cure, for anything that is not an intact 3-D or 4-D
        NIfTI volume of real numbers with a usable affine.
    """
    path = Path(path)
    with _Source(path) as source:
        header, image = source.header, source.image
        shape, stored = _checked_shape(header, path), _checked_dtype(header, path)
        slope, inter = _scaling(header, path)
        raw = _read_voxels(image, shape, stored, path)
    notes = list(source.notes)
    if image.notes:
        notes.extend(image.notes)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    data = _scale(raw.reshape(shape, order="F"), slope, inter)
    affine = _affine(header, path)
    notes.extend(_geometry_notes(header, affine, shape))
    nonfinite = count_nonfinite(data)
    volume = Volume(data, affine, path, header, nonfinite, tuple(notes))
    for note in notes:
        _report(note, path)
    return volume


def read_grid(path: str | os.PathLike[str]) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape (3 or 4 numbers) and affine [4, 4] from the header alone; raises as `read` does, but sees no voxels."""
    path = Path(path)
    with _Source(path) as source:
        shape, stored = _checked_shape(source.header, path), _checked_dtype(source.header, path)
        _scaling(source.header, path)
        _promised(source.image, shape, stored, path)
        affine = _affine(source.header, path)
    check_affine(affine, str(path))
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    return shape, affine


def read_label(
    path: str | os.PathLike[str], like: Volume | None = None, values: Collection[int] | None = None
) -> Volume:
    """Reads a label map.

    Args:
      path: the mask file, one value a voxel.
      like: the image it belongs to; shape and place in space must agree.
      values: the declared labels; 0 (background) is always one of them. None accepts any label from 0 on.

    Returns:
      A volume with integer data [X, Y, Z] in the smallest unsigned type that holds it.

    Raises:
      UserError: naming the file (and the image's, where they disagree), the offending values and the cure.
    """
    volume = read(path)
    if volume.data.ndim != 3:
        raise UserError(
            f"{path}: a label map has one value a voxel, this file has {volume.channels} channels. Merge them into one "
            "map of label values (0 background), or give each structure its own file and task."
        )
    if volume.nonfinite:
        raise UserError(
            f"{path}: {volume.nonfinite} label values are NaN or infinite; a label is an integer. Repair it."
        )
    if like is not None:
        check_same_grid(volume, like)
    data = _as_labels(volume.data, path)
    if values is not None:
        found, numbers = _counted(data)
        declared = {0, *(int(v) for v in values)}
        extra = [(int(v), int(n)) for v, n in zip(found, numbers, strict=True) if int(v) not in declared]
        if extra:
            listed = ", ".join(f"{v} ({n} voxels)" for v, n in extra[:10]) + (", ..." if len(extra) > 10 else "")
            raise UserError(
                f"{path}: undeclared label{'s' if len(extra) > 1 else ''} {listed}; declared are "
                f"{', '.join(map(str, sorted(declared)))}. Declare them in the cohort's labels, or correct the mask."
            )
    return Volume(data, volume.affine, volume.source, volume.header, 0, volume.notes)


def write(path: str | os.PathLike[str], array: np.ndarray, like: Volume) -> None:
    """Writes `array` on the grid of `like`, with its header.

    The file reads back with the very shape and affine of `like`: the source header's qform, sform, their codes, units
    and description are kept as they are; intensity scaling, display range and intent are reset, as they described the
    source's values. The dtype is the smallest integer type that holds the values (bool: uint8); floats keep their
    precision. The file appears whole or not at all, and equal input gives equal bytes.

    Args:
      path: ends in `.nii` or `.nii.gz`; its folder is made.
      array: [X, Y, Z] or [X, Y, Z, C], X, Y, Z as `like`.
      like: where affine and header come from.

    Raises:
      UserError: wrong suffix or shape, values NIfTI cannot hold, or the disk refuses (full, read-only...).
    """
    path = Path(path)
    name = path.name.lower()
    if not name.endswith((".nii", ".nii.gz")):
        raise UserError(f"{path}: only .nii and .nii.gz can be written; give the file one of these endings")
    array = _storable(np.asarray(array), path)
    if array.ndim not in (3, 4) or array.shape[:3] != like.shape:
        raise UserError(f"{path}: cannot write an array of shape {array.shape} on the grid {like.shape} of {like.name}")
    header = _output_header(array, like)
    with _replacing(path) as file:
        if name.endswith(".gz"):
            # No name and no time in the gzip header: the bytes depend on the content alone. Floats hardly compress.
            level = 1 if array.dtype.kind == "f" else 6
            with gzip.GzipFile(filename="", mode="wb", compresslevel=level, fileobj=file, mtime=0) as packed:
                _write_stream(packed, header, array)
        else:
            _write_stream(file, header, array)


_reported: set[str] = set()


def _report(note: str, path: Path) -> None:
    """Reports a note for the first file that has it: a cohort of a thousand alike files gets one line."""
    if (kind := re.sub(r"[-+]?\d[\d.e+-]*", "#", note)) not in _reported:
        _reported.add(kind)
        warn_once(f"{path}: {note} (other files with this are not listed; python -m medjax.data.inspect names them)")


# ---------------------------------------------------------------------------------------------------------- streams


class _Stream(Protocol):
    notes: list[str]

    def readinto(self, view: memoryview) -> int: ...
    def drain(self) -> int: ...
    def capacity(self) -> int: ...


class _PlainStream:
    """An uncompressed file."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size, self.notes = file, size, list[str]()

    def readinto(self, view: memoryview) -> int:
        """Fills `view` as far as the file reaches; returns the bytes read."""
        done = 0
        while done < len(view) and (n := self._file.readinto(view[done:])):  # type: ignore[attr-defined]
            done += n
        return done

    def drain(self) -> int:
        """Bytes that are left."""
        return self._size - self._file.tell()

    def capacity(self) -> int:
        """The most bytes that can still come."""
        return self._size - self._file.tell()


class _GzipStream:
    """A gzip file, read strictly: every member's checksum and length are verified at its end (RFC 1952)."""

    def __init__(self, file: IO[bytes], size: int, path: Path) -> None:
        self._file, self._size, self._path = file, size, path
        self._inflate, self._input, self._left, self._done = inflate.decompressobj(wbits=31), b"", b"", False
        self.notes = list[str]()

    def readinto(self, view: memoryview) -> int:
        done = 0
        while done < len(view):
            piece = self._left or self._next()
            if not piece:
                break
            n = min(len(piece), len(view) - done)
            view[done : done + n] = piece[:n]
            self._left = piece[n:]
            done += n
        return done

    def drain(self) -> int:
        """Reads to the end of the stream, which verifies it; returns the bytes that were left."""
        left, self._left = len(self._left), b""
        while piece := self._next():
            left += len(piece)
        return left

    def capacity(self) -> int:
        return self._size * _MAX_DEFLATE_RATIO

    def _next(self) -> bytes:
        """The next decompressed bytes; b"" at the verified end."""
        while not self._done:
            if self._inflate.eof:
                self._next_member()
                continue
            if not (data := self._input or self._file.read(_CHUNK)):
                raise UserError(
                    f"{self._path}: the gzip stream is cut short (its end and checksum are missing). "
                    "Copy or download the file again."
                )
            self._input = b""
            try:
                if piece := self._inflate.decompress(data):
                    return piece
            except _INFLATE_ERRORS as error:
                raise UserError(
                    f"{self._path}: the gzip stream is corrupt ({error}); voxels would be wrong. "
                    "Copy or download the file again."
                ) from None
        return b""

    def _next_member(self) -> None:
        # After a member come further members, zero padding, or nothing.
        rest = self._inflate.unused_data
        while not (stripped := rest.lstrip(b"\0")) and (rest := self._file.read(_CHUNK)):
            pass
        if len(stripped) == 1:
            stripped += self._file.read(_CHUNK)
        if stripped.startswith(b"\x1f\x8b"):
            self._inflate, self._input = inflate.decompressobj(wbits=31), stripped
            return
        self._done = True
        if stripped:
            self.notes.append("bytes after the end of the gzip stream are ignored; the image itself is intact")


class _Source:
    """An open NIfTI file or pair: `header` (nibabel's) and `image`, the stream that stands at the first voxel."""

    def __init__(self, path: Path) -> None:
        self.notes: list[str] = []
        self._path = path
        self._stack = contextlib.ExitStack()
        try:
            self._open()
        except OSError as error:
            self._stack.close()
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._stack.close()
        if isinstance(error, OSError):
            raise UserError(f"{self._path}: cannot be read: {error.strerror or error}") from None

    def _open(self) -> None:
        header_path, image_path = _pair(self._path)
        stream = self._stream(header_path)
        start = bytearray(540)
        start = start[: stream.readinto(memoryview(start))]
        size, order = _header_size(bytes(start), header_path)
        if len(start) < size:
            raise UserError(f"{header_path}: ends inside its header ({len(start)} of {size} bytes). Copy it again.")
        magic = bytes(start[344:348]) if size == 348 else bytes(start[4:8])
        if magic not in (b"n+1\0", b"ni1\0", b"n+2\0", b"ni2\0"):
            raise UserError(
                f"{header_path}: an ANALYZE 7.5 file (or no NIfTI at all): its header does not say which side is left. "
                "Convert it to NIfTI with a tool that knows how it was made."
            )
        paired = magic[1:2] == b"i"
        if paired and image_path is None:
            raise UserError(
                f"{header_path}: the header says its voxels are in a separate .img file. Name the pair .hdr and .img."
            )
        if not paired and image_path is not None:
            raise UserError(f"{header_path}: holds header and voxels in one. Rename it to .nii (or .nii.gz).")
        self.header, notes = _parse(bytes(start[:size]), size, order, paired, header_path)
        self.notes.extend(notes)
        offset = float(self.header["vox_offset"])
        if not (np.isfinite(offset) and offset >= 0 and offset == int(offset)):
            raise UserError(f"{header_path}: vox_offset {offset} is not a place in a file. The header is damaged.")
        if not paired and offset < (first := self.header.single_vox_offset):  # nibabel takes 0, and header for voxels
            raise UserError(
                f"{header_path}: vox_offset is {offset:g}, but in a file that holds header and voxels these begin at "
                f"{first} or later. Export the file again."
            )
        if paired:
            assert image_path is not None
            stream, skip = self._stream(image_path), int(offset)
        else:
            skip = int(offset) - len(start)
            if skip < 0:  # the first bytes after the header were read with it: only a NIfTI-1 header leaves some
                stream = self._stream(header_path)
                skip = int(offset)
                start = bytearray()
        if skip > stream.capacity():
            raise UserError(
                f"{self._path}: ends before the place where its header says the voxels begin. Copy it again."
            )
        between = bytearray(skip)
        if stream.readinto(memoryview(between)) < skip:
            raise UserError(
                f"{self._path}: ends before the place where its header says the voxels begin. Copy it again."
            )
        if not paired:
            self._extensions(bytes(start) + bytes(between), size, order)
        self.image: _Stream = stream

    def _stream(self, path: Path) -> _Stream:
        if path.is_dir():
            raise UserError(f"{path}: a folder, not a NIfTI file. A DICOM series must be converted first (dcm2niix).")
        if not path.exists():
            raise UserError(f"{path}: no such file. Correct the path, or fetch the file.")
        file = self._stack.enter_context(path.open("rb"))
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise UserError(f"{path}: empty (0 bytes). Copy or download the file again.")
        start = file.read(132)
        file.seek(0)
        for magic, words in _FOREIGN:
            if start.startswith(magic) or (magic[:1] == b"<" and start.lstrip().lower().startswith(magic.lower())):
                raise UserError(f"{path}: {words}.")
        if start[128:] == b"DICM":
            raise UserError(f"{path}: a DICOM file. Convert its series to NIfTI first (dcm2niix).")
        packed, named = start.startswith(b"\x1f\x8b"), path.name.lower().endswith(".gz")
        if packed != named:
            self.notes.append(
                "gzip-compressed although its name does not end in .gz; read by content, other programs will refuse it"
                if packed
                else "not compressed although its name ends in .gz; read by content, other programs will refuse it"
            )
        return _GzipStream(file, size, path) if packed else _PlainStream(file, size)

    def _extensions(self, block: bytes, size: int, order: str) -> None:
        """Parses the header extensions between header and voxels; CIFTI lives in one."""
        if len(block) < size + 4 or block[size] == 0:
            return
        native = "<" if struct.pack("=H", 1) == struct.pack("<H", 1) else ">"
        try:
            extensions = self.header.exts_klass.from_fileobj(
                io.BytesIO(block[size + 4 :]), len(block) - size - 4, order != native
            )
        except Exception:  # extensions carry no geometry: losing damaged ones is no harm to the image
            self.notes.append("its header extensions are damaged and were left out")
            return
        if any(extension.get_code() == 32 for extension in extensions):
            raise UserError(_CIFTI.format(path=self._path))
        self.header.extensions = extensions


_CIFTI = "{path}: a CIFTI file (values of surface points), not a volume. Give the volume it was made from."


def files_of(path: Path) -> tuple[Path, ...]:
    """The files an image at `path` consists of: itself, or header and voxels of a pair."""
    return tuple(part for part in _pair(path) if part is not None)


def _pair(path: Path) -> tuple[Path, Path | None]:
    """(file of the header, file of the voxels or None where it is the same)."""
    name = path.name
    packed = name.lower().endswith(".gz")
    base = name[:-3] if packed else name
    stem, suffix = base[:-4], base[-4:]
    if suffix.lower() not in (".hdr", ".img"):
        return path, None
    parts = []
    for wanted in (".hdr", ".img"):
        if suffix.lower() == wanted:
            parts.append(path)
            continue
        other = wanted.upper() if suffix.isupper() else wanted
        candidates = [path.with_name(stem + other), path.with_name(stem + other + ".gz")]
        found = next((c for c in candidates if c.exists()), None)
        if found is None:
            raise UserError(
                f"{path}: half of a NIfTI pair; {candidates[0].name} is missing beside it. Copy both files."
            )
        parts.append(found)
    return parts[0], parts[1]


# ----------------------------------------------------------------------------------------------------------- header


def _header_size(start: bytes, path: Path) -> tuple[int, str]:
    """(348 or 540, byte order '<' or '>') from the first header field."""
    for order in "<>":
        if len(start) >= 4 and (size := struct.unpack(order + "i", start[:4])[0]) in (348, 540):
            return size, order
    raise UserError(
        f"{path}: not a NIfTI file (it does not begin with a NIfTI header). Convert it, or correct the path."
    )


def _parse(block: bytes, size: int, order: str, paired: bool, path: Path) -> tuple[Any, list[str]]:
    """The nibabel header of `block`, checked, and notes."""
    if size == 348:
        klass = Nifti1PairHeader if paired else Nifti1Header
    else:
        klass = Nifti2PairHeader if paired else Nifti2Header
    header = klass(block, endianness=order, check=False)
    dimensions = int(header["dim"][0])
    if not 1 <= dimensions <= 7:
        raise UserError(
            f"{path}: dim[0], the number of dimensions, is {dimensions}; the header is damaged. Copy it again."
        )
    if 3000 <= int(header["intent_code"]) < 3100:
        raise UserError(_CIFTI.format(path=path))
    if (code := int(header["datatype"])) in _REFUSED_DTYPES:
        raise UserError(f"{path}: holds {_REFUSED_DTYPES[code]}; medjax reads volumes of real numbers. Convert it.")
    notes = []
    # Before nibabel's check, which would put 1 for 0.
    if (np.asarray(header["pixdim"][1:4], np.float64) == 0).any():
        if int(header["sform_code"]) <= 0:
            raise UserError(
                f"{path}: a voxel spacing in the header (pixdim) is 0, so voxels have no size. Set the scanner's "
                "spacing in the header, or export the file again."
            )
        notes.append("a voxel spacing in the header (pixdim) is 0; the sform has it and is used")
    else:
        notes.extend(_sizes(header, path))
    if (np.asarray(header["pixdim"][1:4], np.float64) < 0).any() and int(header["sform_code"]) <= 0:
        notes.append(
            "a voxel spacing in the header (pixdim) is negative; it is taken as positive, which the standard asks for, "
            "but whoever wrote it may have meant that left and right are swapped"
        )
    for key in ("qform_code", "sform_code"):
        # Any code above 0 means that the form is there; nibabel would drop one of a code it does not know.
        if (code := int(header[key])) > _LAST_XFORM_CODE:
            notes.append(f"{key} {code} is none the standard knows; it is taken as 1, the scanner's")
            header[key] = 1
    try:
        header.check_fix(logger=_quiet, error_level=40)
        header.get_data_shape()
    except (HeaderDataError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged header ({error}). Copy the file again, or export it anew.") from None
    return header, notes


def _sizes(header: Any, path: Path) -> Iterator[str]:
    """A note where the sform makes voxels of another size than pixdim, before nibabel corrects that.

    Raises UserError where it is an identity besides: it then is what programs write that know no better, and nobody can
    tell which of the two sizes is the scanner's.
    """
    # A qform is pixdim turned: it is compared with the sform as a whole.
    if int(header["sform_code"]) <= 0 or int(header["qform_code"]) > 0:
        return
    axes = np.abs(np.array([header[f"srow_{axis}"][:3] for axis in "xyz"], np.float64))
    edges = np.sqrt((axes**2).sum(axis=0))
    pixdim = np.abs(np.asarray(header["pixdim"][1:4], np.float64))
    if not np.isfinite([edges, pixdim]).all() or (np.abs(edges - pixdim) <= _PIXDIM_TOLERANCE * pixdim).all():
        return
    made, said = (" x ".join(f"{edge:.4g}" for edge in sizes) for sizes in (edges, pixdim))
    if (np.minimum(axes, np.abs(axes - 1)) < 1e-6).all() and (np.abs(edges - 1) < 1e-6).all():
        raise UserError(
            f"{path}: the header contradicts itself: its sform is an identity, voxels of {made} mm, and pixdim says "
            f"{said}; every length and volume depends on which is right. Write the true spacing and orientation into "
            "the sform (into pixdim, if the sform is right)."
        )
    yield (
        f"the sform makes voxels of {made} mm, pixdim says {said}; the sform is used. If it is not the scanner's, "
        "every length and volume is wrong: correct the header"
    )


def _checked_shape(header: Any, path: Path) -> tuple[int, ...]:
    shape = tuple(int(n) for n in header.get_data_shape())
    if any(n < 1 for n in shape):
        raise UserError(f"{path}: the header gives shape {shape}; every axis needs at least one voxel. It is damaged.")
    core = list(shape)
    while len(core) > 3 and core[-1] == 1:
        core.pop()
    if len(core) < 3:
        raise UserError(
            f"{path}: a {len(core)}-D image of shape {shape}, not a volume. Stack the slices into one 3-D file; "
            "a volume of a single slice has shape (x, y, 1)."
        )
    if len(core) > 4:
        raise UserError(
            f"{path}: a {len(core)}-D image of shape {shape} (a vector or deformation field?). Give one 3-D volume, or "
            "a 4-D one whose last axis is channels."
        )
    if sum(n > 1 for n in core[:3]) < 2:
        raise UserError(
            f"{path}: shape {shape} is one line of values (surface data in a NIfTI file?), not a volume. "
            "Give the volume it was made from."
        )
    return shape


def _checked_dtype(header: Any, path: Path) -> np.dtype:
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise UserError(f"{path}: holds values of type {dtype}; medjax reads volumes of real numbers. Convert it.")
    return dtype


def _scaling(header: Any, path: Path) -> tuple[float, float]:
    try:
        slope, inter = header.get_slope_inter()
    except HeaderDataError as error:
        raise UserError(f"{path}: unusable intensity scaling in the header ({error}). Export the file again.") from None
    if np.isinf(header["scl_slope"]):
        raise UserError(f"{path}: unusable intensity scaling in the header (slope infinite). Export the file again.")
    return (1.0, 0.0) if slope is None else (float(slope), float(inter or 0.0))


def _affine(header: Any, path: Path) -> np.ndarray:
    try:
        affine = np.asarray(header.get_best_affine(), np.float64)
    except (HeaderDataError, ValueError) as error:
        raise UserError(
            f"{path}: the qform in the header is no rotation ({error}). Set a valid qform or sform, or export it again."
        ) from None
    edges = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    if (unit := _unit(header)) and ((edges < _EDGES[0]) | (edges > _EDGES[1])).any():
        listed = " x ".join(f"{edge:.4g}" for edge in edges)
        raise UserError(
            f"{path}: the header gives lengths in {unit}, and voxels of {listed}, which can be no millimetres. Write "
            "qform, sform, pixdim and xyzt_units in millimetres."
        )
    return affine


def _unit(header: Any) -> str:
    """The unit of lengths where the header names another than millimetres."""
    return {1: "metres", 3: "micrometres"}.get(int(header["xyzt_units"]) & 7, "")


def _geometry_notes(header: Any, affine: np.ndarray, shape: tuple[int, ...]) -> Iterator[str]:
    qcode, scode = int(header["qform_code"]), int(header["sform_code"])
    if not qcode and not scode:
        yield (
            "the header says nothing about orientation (qform and sform codes are 0); the NIfTI default is taken, "
            "first axis to the left, which may be wrong: results keep the file's grid, but left and right are not known"
        )
    if qcode and scode:
        try:
            distance = corner_distance(header.get_qform(), affine, shape)
        except (HeaderDataError, ValueError):
            distance = np.inf
        if distance > _QFORM_TOLERANCE * min(np.sqrt((affine[:3, :3] ** 2).sum(axis=0))):
            yield f"qform and sform disagree by {distance:.3g} mm; the sform is used, other programs may use the other"
    if cosine := shear(affine):
        yield (
            f"the affine is sheared (gantry tilt? cosine between axes {cosine:.3g}); voxels are taken along the stored "
            "axes: distances across them are approximate, volumes exact"
        )
    if unit := _unit(header):
        yield f"the header gives lengths in {unit}; they are taken as millimetres"


# ----------------------------------------------------------------------------------------------------------- voxels


def _read_voxels(stream: _Stream, shape: tuple[int, ...], stored: np.dtype, path: Path) -> np.ndarray:
    """The voxels as one line in file order, native byte order, with the stream verified to its end."""
    expected = _promised(stream, shape, stored, path)
    try:
        raw = np.empty(expected, np.uint8)
    except MemoryError:
        raise UserError(
            f"{path}: {expected / 2**30:.1f} GiB of voxels do not fit in memory. Crop or split it."
        ) from None
    got = stream.readinto(raw.data)
    extra = stream.drain()  # verifies the checksum even where too little came
    if got < expected:
        raise UserError(_short(path, shape, expected, got))
    if extra:
        stream.notes.append(f"{extra} bytes after the last voxel are ignored")
    values = raw.view(stored)
    if not stored.isnative:
        values = values.byteswap(inplace=True).view(stored.newbyteorder("="))
    return values.astype(np.float64) if values.dtype.itemsize > 8 else values


def _promised(stream: _Stream, shape: tuple[int, ...], stored: np.dtype, path: Path) -> int:
    """Bytes of the voxels; UserError where the stream cannot hold as many."""
    expected = math.prod(shape) * stored.itemsize
    if expected > stream.capacity():
        raise UserError(_short(path, shape, expected, None))
    return expected


def _short(path: Path, shape: tuple[int, ...], expected: int, got: int | None) -> str:
    held = "the file is far too small" if got is None else f"the file holds {got}"
    return (
        f"{path}: the header promises {expected} bytes of voxels (shape {shape}), {held}. "
        "It is cut short or its header is wrong: copy or download it again."
    )


def _scale(raw: np.ndarray, slope: float, inter: float) -> np.ndarray:
    """`raw * slope + inter`, computed in float64; float32 where that holds the stored type's precision."""
    if slope == 1.0 and inter == 0.0:
        return raw
    dtype: type[np.floating] = np.float64
    if raw.dtype.kind in "iu" and raw.dtype.itemsize <= 2:
        reach = 2.0 ** (8 * raw.dtype.itemsize) * abs(slope) + abs(inter)
        dtype = np.float32 if reach < np.finfo(np.float32).max else dtype
    out = np.empty(raw.shape, dtype, order="F")
    for index in range(raw.shape[-1]):  # slice by slice: no float64 copy of the whole
        out[..., index] = raw[..., index] * np.float64(slope) + np.float64(inter)
    return out


def _as_labels(data: np.ndarray, path: str | os.PathLike[str]) -> np.ndarray:
    """`data` as the smallest unsigned integers that hold it."""
    if data.dtype.kind == "f":
        data = _rounded(data, path)
    low, high = data.min(), data.max()
    if low < 0:
        values, counts = np.unique(data[data < 0], return_counts=True)
        listed = ", ".join(f"{int(v)} ({n} voxels)" for v, n in zip(values[:8], counts[:8], strict=True))
        raise UserError(f"{path}: negative labels {listed}; labels run from 0 (background). Correct the mask.")
    if high >= 2**31:
        raise UserError(f"{path}: label {high:.0f} is too large; labels must stay below 2^31. Renumber the mask.")
    return data.astype(np.min_scalar_type(int(high)), copy=False)


def _rounded(data: np.ndarray, path: str | os.PathLike[str]) -> np.ndarray:
    """Floating-point labels [X, Y, Z] rounded, slice by slice; UserError where they are no integers."""
    out, worst = np.empty(data.shape, data.dtype, order="F"), 0.0
    for index in range(data.shape[2]):
        part = data[..., index]
        np.rint(part, out=out[..., index])
        off = np.abs(part - out[..., index])
        # A large label's scaling is rounded by more: the slope is a float32.
        if (off > LABEL_TOLERANCE + _SLOPE_ROUNDING * np.abs(part)).any():
            break
        worst = max(worst, float(off.max()))
    else:
        if worst > 0:
            warn_once(f"{path}: label values up to {worst:.2g} off the integers (intensity scaling?) were rounded")
        return out
    off = np.abs(data - np.rint(data))
    values, counts = np.unique(data[off > LABEL_TOLERANCE + _SLOPE_ROUNDING * np.abs(data)], return_counts=True)
    listed = ", ".join(f"{v:g}" for v in values[:8]) + (", ..." if len(values) > 8 else "")
    raise UserError(
        f"{path}: {counts.sum()} label values are not integers ({listed}). Was it resampled with "
        "interpolation, or is it a probability map? Give the mask with one integer a voxel."
    )


def _counted(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, how often each) of a label map; piece by piece, for counting widens what it counts to 64 bits."""
    if data.dtype.itemsize > 2:
        return np.unique(data, return_counts=True)
    flat, counts = data.ravel(order="K"), np.zeros(1 << 8 * data.dtype.itemsize, np.int64)
    for start in range(0, flat.size, _PIECE):
        counts += np.bincount(flat[start : start + _PIECE], minlength=counts.size)
    found = np.flatnonzero(counts)
    return found, counts[found]


# ---------------------------------------------------------------------------------------------------------- writing


def _storable(array: np.ndarray, path: Path) -> np.ndarray:
    """`array` in the smallest NIfTI dtype that holds it exactly."""
    if array.dtype.kind == "b":
        return array.astype(np.uint8)
    if array.dtype.kind in "iu":
        low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
        for name in ("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"):
            if np.iinfo(name).min <= low and high <= np.iinfo(name).max:
                return array.astype(name, copy=False)
    if array.dtype.name in ("float16", "bfloat16"):
        return array.astype(np.float32)
    if array.dtype.name in ("float32", "float64"):
        return array
    raise UserError(f"{path}: values of type {array.dtype} cannot be written; give real numbers, integers or booleans")


def _output_header(array: np.ndarray, like: Volume) -> Any:
    """Little-endian single-file header with the geometry of `like` for `array`."""
    source = like.header
    if isinstance(source, Nifti1Header):  # the base of all four NIfTI header classes
        klass = Nifti2Header if isinstance(source, Nifti2Header) else Nifti1Header
        header = klass(source.binaryblock, endianness=source.endianness, check=False).as_byteswapped("<")
        header.extensions = source.extensions
        header["magic"] = klass.single_magic
        header["vox_offset"] = 0  # nibabel sets it to where the voxels begin
    else:
        header = Nifti1Header(endianness="<")
        header.set_xyzt_units("mm")
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    header.set_slope_inter(1.0, 0.0)
    header["cal_min"] = header["cal_max"] = 0
    header.set_intent("none")
    if array.ndim == 4 and not header["pixdim"][4] > 0:
        header["pixdim"][4] = 1
    # Written back as they came, the fields read back to the same numbers; only a volume that was given another
    # affine since needs new ones.
    if source is None or not np.array_equal(header.get_best_affine(), like.affine):
        code = max(int(header["sform_code"]), 1)
        header.set_zooms((*like.spacing, *header.get_zooms()[3:]))
        header.set_sform(like.affine, code)
        header.set_qform(like.affine, code, strip_shears=True)
    return header


def _write_stream(file: Any, header: Any, array: np.ndarray) -> None:
    extensions = header.extensions
    header["vox_offset"] = header.single_vox_offset + extensions.get_sizeondisk()
    file.write(header.binaryblock)
    file.write(b"\1\0\0\0" if len(extensions) else b"\0\0\0\0")
    if len(extensions):
        extensions.write_to(file, False)
    for index in range(array.shape[-1]):  # slice by slice: no second copy of the whole
        file.write(array[..., index].astype(array.dtype.newbyteorder("<"), copy=False).tobytes(order="F"))


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file that becomes `path` once it is complete and on the disk; nothing is left behind on failure."""
    # Processes of one number may write from several machines.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(temporary, "xb")  # noqa: SIM115 (closed below; what another has made is not removed)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None
