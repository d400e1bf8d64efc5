"""The real data that some tests read: `LOOPER_DATA`, else `../shared/data` beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The data folder; skips the test where there is none."""
    folder = Path(os.environ.get("LOOPER_DATA") or (ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}: set LOOPER_DATA")
    return folder
