"""Classes of other packages: which private names they define, where, and what a dotted path leads to."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

PACKAGES = ("continual", "tasks", "analysis")
"""Ours."""

_OF_LANGUAGE = ("builtins", "abc", "typing", "enum")


def is_private(name: str) -> bool:
    """Say whether a name begins with one underscore, and is more than that."""
    return name.startswith("_") and not name.startswith("__") and name.strip("_") != ""


@cache
def private_in(dotted: str) -> frozenset[str]:
    """Return the private names that a class of another package and those that it extends define."""
    return frozenset(name for cls in _parents(dotted) for name in _names_of(cls) if is_private(name))


def definer(dotted: str, name: str) -> str:
    """Return the class that defines a name for ``dotted``, as "module.Class"."""
    cls = next(cls for cls in _parents(dotted) if name in _names_of(cls))
    return f"{cls.__module__}.{cls.__qualname__}"


def _parents(dotted: str) -> list[type]:
    found = find(dotted)
    found = getattr(found, "__origin__", found)
    parents = inspect.getmro(found) if inspect.isclass(found) else ()
    return [cls for cls in parents if cls.__module__ not in _OF_LANGUAGE and not _is_ours(cls)]


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in PACKAGES


@cache
def _names_of(cls: type) -> frozenset[str]:
    return frozenset({*vars(cls), *vars(cls).get("__annotations__", {}), *stored(_syntax(cls))})


@cache
def _syntax(cls: type) -> ast.Module:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # written in C
        return ast.Module([], [])


def knows(cls: type, name: str) -> bool:
    """Say whether a class, or one that it extends, has an attribute, writes it to its objects or reads it there."""
    parents = [parent for parent in inspect.getmro(cls) if parent is not object]
    return any(name in _names_of(parent) or name in set(attributes(_syntax(parent))) for parent in parents)


def find(dotted: str) -> Any:
    """Return what a dotted path leads to; None where it leads nowhere."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            found = getattr(found, part, None)
        return found
    return None


def stored(tree: ast.AST) -> Iterator[str]:
    """Yield the attributes that are written to self or cls."""
    return attributes(tree, (ast.Store,))


def attributes(tree: ast.AST, contexts: tuple[type[ast.expr_context], ...] = (ast.Load, ast.Store)) -> Iterator[str]:
    """Yield the attributes of self or cls that are written or read."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, contexts)):
            continue
        if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
            yield node.attr
