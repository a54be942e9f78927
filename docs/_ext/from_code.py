"""What the reference reads off the code itself: a command's help, and the columns of a run's tables.

{command-help} continual.run            what ``python -m continual.run --help`` prints
{record-tables}                         each parquet table of a run with its columns and their types
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import shlex
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

_DOORS = {"analysis.report": "analysis.report.command"}  # a package, whose door is a module in it


def help_of(command: str) -> str:
    """Return what ``python -m COMMAND --help`` prints; the command may hold subcommands after the module."""
    module, *arguments = shlex.split(command)
    printed = io.StringIO()
    os.environ["COLUMNS"] = "84"
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        importlib.import_module(_DOORS.get(module, module)).main([*arguments, "--help"])
    return printed.getvalue()


class CommandHelp(Directive):
    """Shows a command's help."""

    has_content: ClassVar[bool] = False
    required_arguments: ClassVar[int] = 1
    final_argument_whitespace: ClassVar[bool] = True

    def run(self) -> Sequence[nodes.Node]:
        """Return the block."""
        text = help_of(self.arguments[0])
        return [nodes.literal_block(text, text, language="none")]


class RecordTables(Directive):
    """Lists the tables of a run with their columns."""

    def run(self) -> Sequence[nodes.Node]:
        """Return a definition list: a table's name, and its columns."""
        from continual.storage.records import SCHEMAS

        listed = nodes.definition_list()
        for name, schema in SCHEMAS.items():
            columns = ", ".join(f"{column.name} ({column.type})" for column in schema)
            term = nodes.term("", "", nodes.literal("", f"{name}.parquet"))
            listed += nodes.definition_list_item("", term, nodes.definition("", nodes.paragraph("", columns)))
        return [listed]


def add_field_help(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Document an adapter's fields by the help that each carries, as PEFT's configurations do."""
    if what != "class" or not is_dataclass(obj):
        return
    own = [field for kind in obj.__mro__ if kind.__module__.startswith("continual.") for field in _own_fields(kind)]
    helped = [field for field in own if "help" in field.metadata]
    if helped:
        lines += ["", "Args:", *(f"    {field.name}: {field.metadata['help']}" for field in helped), ""]


def keep_columns(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Show what a module's docstring indents, equations and aligned lists, as it stands there."""
    if what != "module":
        return
    shown: list[str] = []
    for line in lines:
        starts = line.startswith("    ") and not (shown and (shown[-1].startswith("    ") or _in_block(shown)))
        if starts:
            shown += ["", "::", ""]
        if line and not line.startswith(" ") and shown and shown[-1].startswith("    "):
            shown.append("")  # a block that text follows without a blank line
        shown.append(line)
    lines[:] = shown


def _in_block(shown: list[str]) -> bool:
    """Return whether the last line that is not blank is indented."""
    return next((line for line in reversed(shown) if line), "").startswith("    ")


def _own_fields(kind: type) -> list[Any]:
    return [field for field in fields(kind) if field.name in vars(kind).get("__annotations__", {})]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directives; Sphinx calls it."""
    app.add_directive("command-help", CommandHelp)
    app.add_directive("record-tables", RecordTables)
    app.connect("autodoc-process-docstring", add_field_help, priority=100)  # before napoleon reads it
    app.connect("autodoc-process-docstring", keep_columns, priority=900)
    return {"parallel_read_safe": True}
