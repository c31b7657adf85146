"""Digests of images, remembered between processes: a second start need not decode what has not changed.

They lie below the cache folder (`MEDJAX_CACHE`, else `$XDG_CACHE_HOME/medjax`, else `~/.cache/medjax`), in
`hashes/<readers>/`, one JSON file a folder of images. `<readers>` is a digest of the modules that read voxels: another
version of them reads all anew. A digest is believed only while path, size, time of modification, time of change (which
no program can set back) and inode are those it was made of; and of a file that changed within the last seconds none is
remembered, for one more change might fall into the same tick of its file system's clock (git's index does the same:
https://git-scm.com/docs/racy-git).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from medjax.data.nifti import files_of
from medjax.errors import UserError, warn_once, write_atomic
from medjax.ops.native.build import cache_root

SETTLED_NS = 2_500_000_000  # FAT has the coarsest clock: two seconds
_READERS = ("cohort.py", "nifti.py", "volume.py")  # what a digest depends on besides the file

Stamp = list[list[int]]  # of each file an image consists of: size, mtime, ctime, inode
Entries = dict[str, tuple[Stamp, str]]  # path -> (stamp, digest)


def remembered(function: Callable[[Path], str], paths: Iterable[str | os.PathLike[str]], workers: int = 1) -> list[str]:
    """`function` of each image, in order, called only where no digest that still holds is remembered.

    Args:
      function: digest of an image file; there is one such function (`medjax.data.cohort.content_hash`).
      workers: threads.
    """
    files = [Path(os.path.abspath(path)) for path in paths]
    if not files:
        return []
    root = os.path.commonpath([file.parent for file in files])
    store = cache_root() / "hashes" / _readers() / f"{hashlib.blake2b(root.encode(), digest_size=12).hexdigest()}.json"
    known, new = _load(store, root), dict[str, tuple[Stamp, str]]()

    def one(file: Path) -> str:
        before, now = stamp(file), time.time_ns()
        held = known.get(str(file))
        if held and held[0] == before:
            return held[1]
        digest = function(file)
        settled = all(max(mtime, ctime) < now - SETTLED_NS for _, mtime, ctime, _ in before)
        if settled and stamp(file) == before:  # nor if it changed while it was read
            new[str(file)] = before, digest
        return digest

    with ThreadPoolExecutor(max_workers=workers) as pool:
        digests = list(pool.map(one, files))
    if new:
        _save(store, root, new)
    return digests


def stamp(file: Path) -> Stamp:
    """What tells whether an image changed, of each file it consists of (a .hdr has its voxels in an .img)."""
    try:
        found = [os.stat(part) for part in files_of(file)]
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}. Correct the path or fetch the file.") from None
    return [[status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino] for status in found]


def _load(store: Path, root: str) -> Entries:
    """What is remembered of a folder; nothing where the file is damaged or of another folder."""
    try:
        content = json.loads(store.read_text())
        if content["root"] != root:
            return {}
        return {str(name): (entry[0], str(entry[1])) for name, entry in content["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return {}


def _save(store: Path, root: str, new: Entries) -> None:
    # Read again: another process may have added its own. What is lost to a race is read once more, no worse.
    entries = {name: entry for name, entry in _load(store, root).items() if os.path.exists(name)} | new
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(store, json.dumps({"root": root, "files": dict(sorted(entries.items()))}))
    except (OSError, UserError) as error:
        warn_once(
            f"digests of images cannot be remembered ({error}), so every start reads them all again: set MEDJAX_CACHE "
            "to a writable folder"
        )


@functools.cache
def _readers() -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name in _READERS:
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()
