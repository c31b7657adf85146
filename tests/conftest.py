"""Shared fixtures. The real volumes are found by MEDJAX_DATA, else `../shared/data` beside the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real volumes; skips when there is none."""
    root = Path(os.environ.get("MEDJAX_DATA", REPO.parent / "shared" / "data"))
    if not (root / "hippocampus" / "dataset.json").exists():
        pytest.skip(f"no real volumes at {root}: set MEDJAX_DATA to the folder that holds hippocampus/")
    return root
