"""Private names of other packages in a tree of ours, read from its syntax and from the classes that ours extend.

A name is private if it begins with one underscore. It is ours if a class, a function or a variable of ours defines it,
and no class of another package that ours extend does.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from library_classes import PACKAGES, definer, is_private, private_in, stored

ROOM = "continual/compat/"

_BY_NAME = ("getattr", "setattr", "hasattr", "delattr")
_INSIDE_FUNCTIONS = ("__wrapped__", "__closure__", "__globals__", "__code__", "__func__", "__kwdefaults__")
_DOCUMENTED = ("os._exit",)
_ALWAYS_KNOWN = (
    "torch.nn.Module",
    "torch.nn.ParameterDict",
    "peft.PeftModel",
    "transformers.PreTrainedModel",
    "lightning.pytorch.Trainer",
    "jsonargparse.ArgumentParser",
)


def sources(root: Path) -> dict[str, str]:
    """Return the text of every module of ours, by its path below ``root``."""
    paths = (path for package in PACKAGES for path in sorted((root / package).rglob("*.py")))
    return {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}


@dataclass
class Findings:
    """What a tree leans on.

    Attributes:
        lines: A line for each private name of another package, with the file and the line where it stands.
        overrides: Private methods that a class of ours overrides, as "module.Class.method", and the files that do.
    """

    lines: list[str] = field(default_factory=list)
    overrides: dict[str, list[str]] = field(default_factory=dict)


def lean_on(files: Mapping[str, str], allowed: set[str]) -> Findings:
    """Return what a tree leans on outside of compat/.

    Args:
        files: The text of every module, by path.
        allowed: The overrides that are listed; others are told among the lines.
    """
    findings = Findings()
    tree = Tree({path: ast.parse(text) for path, text in files.items() if not path.startswith(ROOM)})
    for path in tree.modules:
        _Reader(path, tree, findings, allowed).read()
    return findings


class Tree:
    """The modules of ours, the names that they define and the classes of other packages that theirs extend."""

    def __init__(self, modules: dict[str, ast.Module]) -> None:
        self.modules = modules
        self.imports = {path: dict(_imports(module)) for path, module in modules.items()}
        self.classes = {
            f"{_dotted(path)}.{node.name}": (path, node)
            for path, module in modules.items()
            for node in ast.walk(module)
            if isinstance(node, ast.ClassDef)
        }
        self._bases: dict[str, list[str]] = {}
        known = {*_ALWAYS_KNOWN, *(base for name in self.classes for base in self.outer_bases(name))}
        self.theirs = {name for base in known for name in private_in(base)}
        self.defined = {name for module in modules.values() for name in _defined(module)}
        self.ours = self.defined - self.theirs

    def outer_bases(self, name: str) -> list[str]:
        """Return the classes of other packages that a class of ours extends, by way of ours or at once."""
        if name in self._bases:
            return self._bases[name]
        path, node = self.classes[name]
        found: list[str] = []
        for base in node.bases:
            dotted = self.resolve(path, base)
            if dotted in self.classes:
                found += self.outer_bases(dotted)
            elif dotted is not None:
                found.append(dotted)
        self._bases[name] = found
        return found

    def resolve(self, path: str, node: ast.expr) -> str | None:
        """Return the dotted path that a name or an attribute stands for in a module; None for a local value."""
        if isinstance(node, ast.Subscript):
            return self.resolve(path, node.value)
        if isinstance(node, ast.Attribute):
            owner = self.resolve(path, node.value)
            return None if owner is None else f"{owner}.{node.attr}"
        if not isinstance(node, ast.Name):
            return None
        own = f"{_dotted(path)}.{node.id}"
        return own if own in self.classes else self.imports[path].get(node.id)


class _Reader(ast.NodeVisitor):
    """Reads one module; knows the class and the method that a node stands in."""

    def __init__(self, path: str, tree: Tree, findings: Findings, allowed: set[str]) -> None:
        self.path, self.tree, self.findings, self.allowed = path, tree, findings, allowed
        self.owner: str | None = None
        self.method: str | None = None

    def read(self) -> None:
        self.visit(self.tree.modules[self.path])

    def tell(self, node: ast.AST, what: str) -> None:
        self.findings.lines.append(f"{self.path}:{getattr(node, 'lineno', 0)}: {what}: it belongs in {ROOM}")

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._imported(node, alias.name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            self._imported(node, f"{node.module}.{alias.name}")

    def _imported(self, node: ast.AST, dotted: str) -> None:
        if _is_theirs(dotted) and any(map(is_private, dotted.split("."))):
            self.tell(node, f"imports {dotted}")

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self.owner = self.owner, f"{_dotted(self.path)}.{node.name}"
        for name in filter(is_private, _assigned(node.body)):
            for base in self.tree.outer_bases(self.owner):
                if name in private_in(base):
                    self._override(node, f"{definer(base, name)}.{name}")
        self.generic_visit(node)
        self.owner = before

    def _override(self, node: ast.ClassDef, method: str) -> None:
        files = self.findings.overrides.setdefault(method, [])
        if self.path not in files:
            files.append(self.path)
        if method not in self.allowed:
            self.tell(node, f"{node.name} overrides {method}, which compat/overrides.py lacks")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        before = self.method
        self.method = self.method or node.name
        self.generic_visit(node)
        self.method = before

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self.tree.resolve(self.path, node.value) if isinstance(node.ctx, ast.Store) else None
        if owner is not None and _is_theirs(owner) and not is_private(node.attr):
            self.tell(node, f"replaces {owner}.{node.attr}")
        if node.attr in _INSIDE_FUNCTIONS:
            self.tell(node, f"looks inside of a function by {node.attr}")
        self._used(node, node.value, node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Name) and node.func.id in _BY_NAME and len(node.args) > 1:
            self._by_name(node, node.args[0], node.args[1])
        name = node.args[0] if node.args else None
        if ast.unparse(node.func).endswith("import_module") and isinstance(name, ast.Constant):
            self._imported(node, str(name.value))
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        call = node.value
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "vars" and call.args:
            self._by_name(node, call.args[0], node.slice)
        self.generic_visit(node)

    def _by_name(self, node: ast.AST, owner: ast.expr, name: ast.expr) -> None:
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            self._used(node, owner, name.value)

    def _used(self, node: ast.AST, owner: ast.expr, name: str) -> None:
        if not is_private(name) or f"{ast.unparse(owner)}.{name}" in _DOCUMENTED:
            return
        bases = [] if self.owner is None else self.tree.outer_bases(self.owner)
        if ast.unparse(owner) == "super()":
            is_ours = name == self.method or not any(name in private_in(base) for base in bases)
        elif isinstance(owner, ast.Name) and owner.id in ("self", "cls") and self.owner is not None:
            is_ours = name in self.tree.defined and not any(name in private_in(base) for base in bases)
        else:
            is_ours = name in self.tree.ours
        if not is_ours:
            self.tell(node, f"uses {ast.unparse(owner)}.{name}")


# -- syntax -----------------------------------------------------------------------------------------------------------


def _is_theirs(dotted: str) -> bool:
    """Say whether a dotted path leads into another package; Python's own do not count."""
    first = dotted.partition(".")[0]
    return first not in PACKAGES and first not in sys.stdlib_module_names


def _dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imports(module: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield what each name that a module imports stands for."""
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                yield (alias.asname, alias.name) if alias.asname else (first, first)


def _assigned(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the names that a module's or a class's own statements define."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            yield from (part.id for part in parts if isinstance(part, ast.Name))


def _defined(module: ast.Module) -> Iterator[str]:
    """Yield the private names that a module, its classes and their methods, by way of self, define."""
    for node in ast.walk(module):
        if isinstance(node, (ast.Module, ast.ClassDef)):
            yield from filter(is_private, _assigned(node.body))
    yield from filter(is_private, stored(module))
