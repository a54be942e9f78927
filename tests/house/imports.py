"""The import arrows of a tree, read from its syntax: at the top, inside functions and under TYPE_CHECKING alike."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("continual", "tasks", "analysis")


def modules(root: Path) -> dict[str, Path]:
    """Return the modules of the packages below ``root``, by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def arrows(root: Path) -> dict[str, set[str]]:
    """Return which modules each module imports."""
    known = modules(root)
    return {name: {target for target in _imported(path, known) if target != name} for name, path in known.items()}


def _imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in known:
                    yield inner
                elif node.module in known:
                    yield node.module


def room(module: str, root: Path) -> str:
    """Return the room of a module: a folder of continual/, analysis/ or adapters/, or a file in the package's own.

    All of tasks is one room. A front, adapters/__init__.py, is one by itself: it names what stands behind it.
    """
    parts = module.split(".")
    if parts[0] == "tasks" or len(parts) == 1:
        return parts[0]
    if root.joinpath(*parts).is_dir():
        return f"{module} (front)" if module == "continual.adapters" else module
    return module if len(parts) == 2 else ".".join(parts[:-1])


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the circles of a graph: its strongly connected components of more than one node (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for target in graph.get(node, ()):
            if target not in order:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], order[target])
        if low[node] == order[node]:
            part = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(part) > 1:
                found.append(sorted(part))

    for node in graph:
        if node not in order:
            visit(node)
    return sorted(found)
