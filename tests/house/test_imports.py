"""The contract of the house: no circle, imports only point down, and continual draws reports at one place."""

from __future__ import annotations

from pathlib import Path

import pytest
from imports import arrows, circles, modules, room

ROOT = Path(__file__).resolve().parents[2]

# From the bottom up. A room may import those before it; the doors, last, may not import one another.
ORDER = [
    ["continual", "continual.errors", "continual.measures", "tasks"],
    ["continual.interfaces", "continual.compat"],
    ["continual.storage"],
    ["continual.backbones"],
    ["continual.runtime"],
    ["continual.data"],
    ["continual.adapters"],
    ["continual.adapters.queryable"],
    ["continual.adapters.experts", "continual.adapters.growing"],
    ["continual.adapters (front)"],
    ["continual.scoring"],
    ["continual.strategies"],
    ["continual.callbacks"],
    ["continual.training"],
    ["continual.config"],
    ["continual.engine"],
    ["continual.sweeps"],
    ["continual.commands"],
    ["continual.run", "continual.sweep", "continual.rescore", "continual.ablate", "continual.cli"],
]
ANALYSIS = ["analysis.measures", "analysis.runs", "analysis.summaries", "analysis.figures", "analysis.report"]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def broken(root: Path) -> list[str]:
    """Return a line for each import that the contract forbids."""
    found, graph = [], arrows(root)
    for module, targets in graph.items():
        for target in sorted(targets):
            own, other = room(module, root), room(target, root)
            if (line := _why(own, other)) and not _allowed(module, target):
                found.append(f"{module} imports {target}: {line}")
    found += [f"a circle of modules: {' '.join(circle)}" for circle in circles(graph)]
    rooms: dict[str, set[str]] = {}
    for module, targets in graph.items():
        own = room(module, root)
        rooms.setdefault(own, set()).update({room(target, root) for target in targets} - {own})
    return found + [f"a circle of rooms: {' '.join(circle)}" for circle in circles(rooms)]


def _allowed(module: str, target: str) -> bool:
    return (module, target) == ("continual.commands.finish", "analysis.report")  # the lazy call that draws


def _why(own: str, other: str) -> str:
    if own == other:
        return ""
    if own.split(".")[0] == "tasks":
        return "tasks knows nothing of the other packages"
    if own.startswith("analysis"):
        if other.startswith("analysis"):
            return "" if _rank(other) < _rank(own) else "it runs up"
        return "" if other in ("continual.storage", "continual.measures") else "analysis knows the records alone"
    if other.startswith("analysis"):
        return "continual draws reports at one place"
    own_level, other_level = (LEVEL.get(name) for name in (own, other))
    if own_level is None or other_level is None:
        return f"{own if own_level is None else other} is no room of the plan"
    return "" if other_level < own_level else "it runs up"


def _rank(name: str) -> int:
    return len(ANALYSIS) if name == "analysis" else ANALYSIS.index(name)


def test_imports_point_down_and_close_no_circle() -> None:
    assert broken(ROOT) == []


def test_the_package_itself_holds_the_doors_interfaces_and_errors_alone() -> None:
    files = {path.stem for path in (ROOT / "continual").glob("*.py")}
    assert files == {"__init__", "run", "sweep", "cli", "rescore", "ablate", "interfaces", "errors"}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small tree that keeps the contract."""
    for name, text in {
        "continual/errors.py": "",
        "continual/storage/files.py": "from continual.errors import X",
        "continual/engine/loop.py": "from continual.storage import files",
        "tasks/base.py": "",
        "analysis/runs/load.py": "from continual.storage import files",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in {path.parent for path in tmp_path.rglob("*.py")} | {tmp_path / "continual", tmp_path / "analysis"}:
        (folder / "__init__.py").touch()
    assert broken(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(
    ("file", "text", "line"),
    [
        ("continual/storage/files.py", "from continual.engine import loop", "it runs up"),
        (
            "continual/storage/files.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from continual.engine.loop import Loop",
            "it runs up",
        ),
        ("continual/storage/files.py", "def f():\n    import continual.engine.loop", "a circle of modules"),
        ("continual/engine/loop.py", "from analysis.runs import load", "continual draws reports at one place"),
        ("analysis/runs/load.py", "from continual.engine import loop", "analysis knows the records alone"),
        ("tasks/base.py", "from continual.errors import X", "tasks knows nothing"),
        ("continual/attic/box.py", "from continual.errors import X", "is no room of the plan"),
    ],
)
def test_an_arrow_that_runs_up_is_named(house: Path, file: str, text: str, line: str) -> None:
    path = house / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    (path.parent / "__init__.py").touch()
    assert any(line in each for each in broken(house)), broken(house)


def test_every_module_is_read(house: Path) -> None:
    assert "continual.engine.loop" in modules(house) and len(modules(ROOT)) > 100
