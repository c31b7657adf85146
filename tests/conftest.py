"""Shared fixtures. The real volumes are found by MEDJAX_DATA, else `../shared/data` beside the project."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]

# Many tests compile the same small programs, some of them in processes of their own: compile each once a session.
_cache = tempfile.TemporaryDirectory(prefix="medjax-xla-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _cache.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real volumes; skips when there is none."""
    root = Path(os.environ.get("MEDJAX_DATA", REPO.parent / "shared" / "data"))
    if not (root / "hippocampus" / "dataset.json").exists():
        pytest.skip(f"no real volumes at {root}: set MEDJAX_DATA to the folder that holds hippocampus/")
    return root


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe of `tiny.py`; its cohort lies beside it."""
    from tiny import write_cohort, write_recipe

    folder = tmp_path_factory.mktemp("tiny")
    return write_recipe(folder / "tiny.py", write_cohort(folder / "cohort"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an untrained network, to begin from."""
    from untrained import make_run

    return make_run(tmp_path_factory.mktemp("base") / "run", seed=3)
