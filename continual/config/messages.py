"""Makes one clear line of what a configuration parser complains about: which key, what is wrong, the near names."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser
from peft import PeftConfig

from continual.backbones import Backbone
from continual.compat import jsonargparse as compat

RUN_STAGES = "run-stages"
"""The subcommand of ``continual.cli`` that takes the configuration of a run."""


def explain(error: Exception, tree: dict[str, Any], stage_class: type, keys: Sequence[str]) -> str:
    """Return one line for a parser's error.

    Args:
        error: What jsonargparse, or a constructor that it called, raised.
        tree: The configuration that was parsed, to find out which stage is at fault.
        stage_class: The class of a stage.
        keys: The dotted keys of a configuration.
    """
    text = str(error)
    named = compat.faulty_keys(text)
    place = ".".join(named)
    if not named or named[0] == "stages":
        # A constructor's own error names no place, and the parser's names no stage.
        place = ".".join([_failing_part(tree, stage_class, text) or ".".join(named[:1]), *named[1:]])
    classes = compat.faulty_classes(text)
    message = _what(text, classes, keys)
    if classes and classes[-1].rpartition(".")[2] in ("PeftConfig", "Backbone", "Task"):
        message += f"; {place} needs a class_path"
    return f"{place}: {message}" if place and place not in message else message


def near(name: str, names: list[str]) -> str:
    """Return "; did you mean ..." with the closest of ``names``, or nothing."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _what(text: str, classes: list[str], keys: Sequence[str]) -> str:
    if found := compat.unknown_option_of_subcommand(text):
        command, option = found
        names = sorted({key.split(".")[0] for key in keys}) if command == RUN_STAGES else []
        return f"unknown key {option!r} in the configuration of {command}{near(option, names)}"
    if found := compat.unknown_option(text):
        group, option = found
        if group is None and not classes:
            classes = compat.given_classes(text)
        owner, names = _owner(group, classes, keys)
        return f"unknown key {option!r} in {owner}{near(option.split('.')[0 if group else -1], names)}"
    if found := compat.missing_name(text):
        module, name = found
        names = [n for n in dir(importlib.import_module(module)) if not n.startswith("_")]
        return f"there is no class {name!r} in {module}{near(name, names)}"
    if inner := compat.inside_optional(text):
        return _what(inner, [], keys)
    if found := compat.unmatched_union(text):
        kinds, value = found
        return f"expected {' or '.join(kinds).replace('NoneType', 'null')}, got {' '.join(value.split())}"
    if found := compat.unmatched_type(text):
        kind, value = found
        return f"expected {kind}, got {' '.join(value.split())}"
    if wanted := compat.class_without_path(text):
        return f"it needs a class_path that names a {wanted}"
    if path := compat.path_without_module(text):
        return f"there is no class {path!r}: give its module too, as in continual.backbones.CausalLM"
    return compat.without_places(text)


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
