"""The functions of continual/compat/, what they stand in for, who uses them, and the line for one that is broken."""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from library_classes import find, knows
from private_names import Findings, lean_on, sources

from continual.compat.overrides import OVERRIDES, Override
from continual.compat.stand_in import StandIn

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("peft", "transformers", "lightning", "torch", "jsonargparse")

Function = Callable[..., Any]


def functions() -> list[Function]:
    """Return the public functions of the libraries' modules in compat/."""
    modules = [importlib.import_module(f"continual.compat.{library}") for library in LIBRARIES]
    return [
        value
        for module in modules
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    ]


def stand_in(function: Function) -> StandIn:
    """Return the note on a function."""
    return function.stand_in  # type: ignore[attr-defined]


@cache
def users() -> dict[str, list[str]]:
    """Return which files use each function of compat/, by "library.name"."""
    found: dict[str, list[str]] = {}
    for path, text in sources(ROOT).items():
        for name in dict.fromkeys(_compat_names(ast.parse(text))):
            found.setdefault(name, []).append(path)
    return found


def _compat_names(module: ast.Module) -> Iterator[str]:
    """Yield the names that a module imports from compat/, or reads off one of its modules."""
    modules: dict[str, str] = {}
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom) and node.module == "continual.compat":
            modules |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("continual.compat."):
            yield from (f"{str(node.module).rpartition('.')[2]}.{alias.name}" for alias in node.names)
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            yield f"{modules[node.value.id]}.{node.attr}"


@cache
def findings() -> Findings:
    """Return what this tree leans on."""
    return lean_on(sources(ROOT), {override.name.partition("(")[0] for override in OVERRIDES})


def line(function: Function, what: str) -> str:
    """Return the line that says what of a function's contract is broken."""
    note, place = stand_in(function), function.__module__.replace(".", "/")
    return _line(note.library, note.read_in, what, f"{place}.py ({function.__name__})", users_of(function))


def name_of(function: Function) -> str:
    """Return a function's name as "library.name"."""
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


def users_of(function: Function) -> list[str]:
    """Return the files that use a function, by way of others of its module too."""
    beside = [other for other in functions() if other.__module__ == function.__module__ and other is not function]
    inside = [other for other in beside if function.__name__ in inspect.unwrap(other).__code__.co_names]
    found = [path for each in (function, *inside) for path in users().get(name_of(each), [])]
    return list(dict.fromkeys(found))


def _line(library: str, read_in: str, what: str, own: str, files: list[str]) -> str:
    return (
        f"{library} {version(library)} is installed, and {what} (read in {read_in}): mend {own}; "
        f"it is leaned on in {', '.join(files) or 'no file'}"
    )


def broken(function: Function) -> list[str]:
    """Return a line for each name that a function stands in for and that is gone or takes other parameters."""
    return [line(function, what) for name in stand_in(function).names if (what := moved(name))]


def broken_override(override: Override) -> str | None:
    """Return a line for a method that our subclasses override and that is gone or takes other parameters."""
    if not (what := moved(override.name)):
        return None
    files = findings().overrides.get(override.name.partition("(")[0], [])
    return _line(override.name.partition(".")[0], override.read_in, what, "the methods that override it", files)


def moved(name: str) -> str | None:
    """Return what is wrong with a name of a library, as StandIn writes it; None where it is as it was read."""
    path, _, parameters = name.partition("(")
    owner, _, last = path.rpartition(".")
    found = find(path)
    if found is None:
        return None if inspect.isclass(cls := find(owner)) and knows(cls, last) else f"{path} is gone"
    if parameters and (taken := parameters_of(found)) != f"({parameters}":
        return f"{path} takes {taken} in the place of ({parameters}"
    return None


def parameters_of(function: Function) -> str:
    """Return a function's parameters with their defaults, without annotations."""
    signature = inspect.signature(function)
    plain = [each.replace(annotation=inspect.Parameter.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
