"""Print constraints that hold every package of pyproject.toml at its floor, but torch at the locked version.

    python requirements/floors.py > floors.txt

``make test-oldest`` installs by them: what pyproject.toml allows at the least has to work.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_TOOLS = {"pip-tools", "pre-commit", "pyright", "ruff"}
"""What no test imports; any version will do."""


def floors(pyproject: str, lock: str) -> list[str]:
    """Return a line ``name==version`` for each requirement of the project and of its extra dev.

    Raises:
        ValueError: A requirement names no floor.
    """
    project = tomllib.loads(pyproject)["project"]
    found = []
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name = re.match(r"[\w.-]+", requirement)
        floor = re.search(r">=([\w.]+)", requirement)
        if name is None or floor is None:
            raise ValueError(f"{requirement!r} names no floor: write name>=version")
        if name[0] == "torch":
            found += [line for line in lock.splitlines() if line.startswith("torch==")]
        elif name[0] not in _TOOLS:
            found.append(f"{name[0]}=={floor[1]}")
    return found


if __name__ == "__main__":
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    lock_file = ROOT / "requirements" / f"lock-{python}.txt"
    print("\n".join(floors((ROOT / "pyproject.toml").read_text("utf-8"), lock_file.read_text("utf-8"))))
