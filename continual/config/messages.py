"""Makes one clear line of what a configuration parser complains about: which key, what is wrong, the near names."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser
from peft import PeftConfig

from continual.backbones import Backbone

_KEY = re.compile(r'Parser key "([^"]+)"')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_OPTION = re.compile(r"(?:Group '([^']+)' does not accept option|Option) '([^']+)'(?: is not accepted)?")
_UNION = re.compile(r"Subtypes: \[(.*?)\]\s*Errors:.*Given value: (.*?)(?:\. Got value: .*)?$", re.DOTALL)
_OPTIONAL = re.compile(  # a class or null, given by a class_path
    r"Subtypes: \[<class '[^']+'>, <class 'NoneType'>\]\s*Errors:\s*- (.*?)\s*"
    r"- Expected a <class 'NoneType'>.*class_path",
    re.DOTALL,
)
_PLAIN = re.compile(r"Expected a <class '([^']+)'>\. Got value: (.*)", re.DOTALL)
_NOT_SUBCLASS = re.compile(r"Not a valid subclass of (\w+)\. Got value: \{")
_NO_DOT = re.compile(r"Expected a dot import path string: (\S+)")
_MISSING_NAME = re.compile(r"module '([^']+)' has no attribute '([^']+)'")


def explain(error: Exception, tree: dict[str, Any], stage_class: type, keys: Sequence[str]) -> str:
    """Return one line for a parser's error.

    Args:
        error: What jsonargparse, or a constructor that it called, raised.
        tree: The configuration that was parsed, to find out which stage is at fault.
        stage_class: The class of a stage.
        keys: The dotted keys of a configuration.
    """
    text = str(error)
    named = _KEY.findall(text)
    place = ".".join(named)
    if not named or named[0] == "stages":
        # A constructor's own error names no place, and the parser's names no stage.
        place = ".".join([_failing_part(tree, stage_class, text) or ".".join(named[:1]), *named[1:]])
    classes = _CLASS.findall(text)
    message = _what(text, classes, keys)
    if classes and classes[-1].rpartition(".")[2] in ("PeftConfig", "Backbone", "Task"):
        message += f"; {place} needs a class_path"
    return f"{place}: {message}" if place and place not in message else message


def near(name: str, names: list[str]) -> str:
    """Return "; did you mean ..." with the closest of ``names``, or nothing."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _what(text: str, classes: list[str], keys: Sequence[str]) -> str:
    if found := _OPTION.search(text):
        group, option = found.groups()
        if group is None and not classes and (given := re.findall(r"class_path='([^']+)'", text)):
            classes = given
        owner, names = _owner(group, classes, keys)
        return f"unknown key {option!r} in {owner}{near(option.split('.')[0 if group else -1], names)}"
    if found := _MISSING_NAME.search(text):
        module, name = found.groups()
        names = [n for n in dir(importlib.import_module(module)) if not n.startswith("_")]
        return f"there is no class {name!r} in {module}{near(name, names)}"
    if found := _OPTIONAL.search(text):
        return _what(found.group(1), [], keys)
    if found := _UNION.search(text):
        kinds = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", found.group(1)).replace("NoneType", "null")
        kinds = re.sub(r"typing\.Literal\[(.*?)\]", r"\1", kinds)
        return f"expected {kinds.replace(', ', ' or ')}, got {' '.join(found.group(2).split())}"
    if found := _PLAIN.search(text):
        return f"expected {found.group(1)}, got {' '.join(found.group(2).split())}"
    if found := _NOT_SUBCLASS.search(text):
        return f"it needs a class_path that names a {found.group(1)}"
    if found := _NO_DOT.search(text):
        return f"there is no class {found.group(1)!r}: give its module too, as in continual.backbones.CausalLM"
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not _KEY.match(line) and not _CLASS.match(line)]
    return " ".join(lines) or text


def _owner(group: str | None, classes: list[str], keys: Sequence[str]) -> tuple[str, list[str]]:
    """Return what an unknown key was given to, and the keys that it takes."""
    if group is None and classes:
        module, _, name = classes[-1].rpartition(".")
        owner = getattr(importlib.import_module(module), name)
        return name, list(inspect.signature(owner).parameters)
    prefix = f"{group}." if group else ""
    names = {key.removeprefix(prefix).split(".")[0] for key in keys if key.startswith(prefix)}
    return group or "the configuration", sorted(names)


def _failing_part(tree: dict[str, Any], stage_class: type, text: str) -> str:
    """Return which stage, or which part of the model, raises ``text`` when it is built alone; "" if none does."""
    model = tree.get("model") or {}
    parts = [(f"stages.{stage['name']}", stage_class, stage) for stage in tree.get("stages") or []]
    parts += [("model.backbone", Backbone, model.get("backbone")), ("model.adapter", PeftConfig, model.get("adapter"))]
    for place, kind, part in parts:
        parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
        parser.add_argument("--part", type=kind)
        try:
            parser.instantiate(parser.parse_object({"part": copy.deepcopy(part)}))
        except Exception as error:
            if kind is stage_class or str(error) in text:
                return place
    return ""
