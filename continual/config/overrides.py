"""A configuration's text as a tree: read, changed by dotted keys, its stages named."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from continual.errors import ConfigError, one_line

KEYS = (
    *("name", "seed", "threads", "scoring", "bounds", "model", "data", "trainer", "stages"),
    *("token_sample", "general_ability", "best_checkpoint", "theory", "wordings", "recorders"),
)
"""The keys of a configuration, at the top."""


def read_text(path: Path) -> str:
    """Return the text of a configuration file, or raise ConfigError."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the configuration {path}: {reason}") from error


def read_tree(text: str, overrides: Sequence[str] = (), where: str = "configuration") -> dict[str, Any]:
    """Return a configuration's tree with the overrides applied, its stages named and no more than that checked."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{where} has to be a mapping with the keys model and stages")
    for override in overrides:
        _apply(tree, override)
    _check_keys(tree, where)
    _check_groups(tree, where)
    _check_stage_names(tree, where)
    return tree


def _check_keys(tree: dict[str, Any], where: str) -> None:
    """Raise ConfigError for a key that no configuration has, before anything is made of its absence."""
    for key in tree:
        if key not in KEYS:
            close = difflib.get_close_matches(str(key), KEYS, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(KEYS)}"
            raise ConfigError(f"{where}: unknown key {key!r} in the configuration; {hint}")


def _check_groups(tree: dict[str, Any], where: str) -> None:
    for group in ("model", "data", "trainer"):
        if group in tree and not isinstance(tree[group], dict):
            raise ConfigError(f"{where}: {group} has to be a mapping of its arguments, got {tree[group]!r}")


def _check_stage_names(tree: dict[str, Any], where: str) -> None:
    stages = tree.get("stages")
    if not stages or not isinstance(stages, list):
        raise ConfigError(f"{where}: stages has to list at least one stage")
    names: list[str] = []
    for index, stage in enumerate(stages):
        name = stage.get("name") if isinstance(stage, dict) else None
        if not isinstance(name, str) or not name:
            raise ConfigError(f"{where}: stages.{index} has no name")
        if name in names:
            raise ConfigError(f"{where}: two stages are named {name!r} (stages.{names.index(name)} and stages.{index})")
        names.append(name)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"cannot understand {override!r}: an override is dotted.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {override!r} is not valid YAML: {one_line(error)}") from error
    set_key(tree, key, value)


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set one dotted key of a configuration's tree; a stage is named by its name, its index, or ``*`` for all."""
    *parents, last = key.split(".")
    nodes: list[Any] = [tree]
    for part in parents:
        nodes = [child for node in nodes for child in _children(node, part, key)]
    for node in nodes:
        if isinstance(node, list):
            node[_position(node, last, key)] = copy.deepcopy(value)
        elif isinstance(node, dict):
            node[last] = copy.deepcopy(value)
        else:
            raise ConfigError(f"override {key!r}: what stands before {last!r} is not a mapping")


def _children(node: Any, part: str, key: str) -> list[Any]:
    if isinstance(node, list):
        return list(node) if part == "*" else [node[_position(node, part, key)]]
    if not isinstance(node, dict):
        raise ConfigError(f"override {key!r}: {part!r} is not inside a mapping")
    if node.get(part) is None:
        node[part] = {}
    return [node[part]]


def _position(items: list[Any], part: str, key: str) -> int:
    names = [item.get("name") for item in items if isinstance(item, dict)]
    if part in names:
        return names.index(part)
    if part.isdigit() and int(part) < len(items):
        return int(part)
    raise ConfigError(f"override {key!r}: there is no {part!r}; there are {', '.join(map(str, names)) or 'none'}")
