"""Folders that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty folder to write into; it takes the place of ``folder`` once everything in it is written."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for path in temporary.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes for its owner alone
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def size_bytes(folder: Path) -> int:
    """Return the bytes of all files below ``folder``; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
