"""Makes one clear line of what a configuration parser complains about: which key, what is wrong, the near names."""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from typing import Any

from jsonargparse import ArgumentParser

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_OPTION = re.compile(r"(?:Group '([^']+)' does not accept option|Option) '([^']+)'(?: is not accepted)?")
_MISSING_NAME = re.compile(r"module '([^']+)' has no attribute '([^']+)'")


def explain(error: Exception, tree: dict[str, Any], stage_class: type) -> str:
    """Return one line for a parser's error.

    Args:
        error: What jsonargparse, or a constructor that it called, raised.
        tree: The configuration that was parsed, to find out which stage is at fault.
        stage_class: The class of a stage.
    """
    text = str(error)
    keys = _KEY.findall(text)
    place = ".".join(keys)
    if keys[:1] == ["stages"]:
        place = ".".join([_failing_stage(tree, stage_class), *keys[1:]])
    classes = _CLASS.findall(text)
    message = _what(text, classes)
    return f"{place}: {message}" if place and place not in message else message


def near(name: str, names: list[str]) -> str:
    """Return "; did you mean ..." with the closest of ``names``, or nothing."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _what(text: str, classes: list[str]) -> str:
    if found := _OPTION.search(text):
        group, option = found.groups()
        owner, names = _owner(group, classes)
        return f"unknown key {option!r} in {owner}{near(option.split('.')[-1], names)}"
    if found := _MISSING_NAME.search(text):
        module, name = found.groups()
        names = [n for n in dir(importlib.import_module(module)) if not n.startswith("_")]
        return f"there is no class {name!r} in {module}{near(name, names)}"
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not _KEY.match(line) and not _CLASS.match(line)]
    return " ".join(lines) or text


def _owner(group: str | None, classes: list[str]) -> tuple[str, list[str]]:
    """Return what an unknown key was given to, and the keys that it takes."""
    from continual.experiment import make_parser

    if group is None and classes:
        module, _, name = classes[-1].rpartition(".")
        owner = getattr(importlib.import_module(module), name)
        return name, list(inspect.signature(owner).parameters)
    known = [action.dest for action in make_parser()._actions if action.dest]
    prefix = f"{group}." if group else ""
    names = {dest.removeprefix(prefix).split(".")[0] for dest in known if dest.startswith(prefix)}
    return group or "the configuration", sorted(names)


def _failing_stage(tree: dict[str, Any], stage_class: type) -> str:
    for stage in tree["stages"]:
        parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
        parser.add_argument("--stage", type=stage_class)
        try:
            parser.parse_object({"stage": stage})
        except Exception:  # whatever it is, the caller has its text already
            return f"stages.{stage.get('name')}"
    return "stages"
