"""The bounds that a configuration may ask for: their names, and the configuration of each one's run."""

from __future__ import annotations

import difflib
from typing import Any

import yaml

from continual.errors import ConfigError

# What takes the strategy's place; None for a bound that the run itself holds.
BOUNDS = {"zero_shot": None, "per_task": "PerTask", "joint": "Joint", "per_instruction_lookup": "PerInstructionLookup"}


FOLDER = "bounds"


def check(names: list[str]) -> None:
    """Raise ConfigError for a name that is not in BOUNDS, or is given twice."""
    for name in names:
        if name not in BOUNDS:
            near = difflib.get_close_matches(name, BOUNDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(BOUNDS)}"
            raise ConfigError(f"bounds: there is no {name!r}; {hint}")
    if len(set(names)) < len(names):
        raise ConfigError("bounds: a name is given twice")


def configuration(text: str, name: str) -> str:
    """Return the resolved configuration ``text`` with the strategy of the bound ``name``."""
    tree = yaml.safe_load(text)
    strategy: dict[str, Any] = {"class_path": f"continual.strategies.{BOUNDS[name]}", "init_args": {}}
    tree["model"]["strategy"] = strategy
    return yaml.safe_dump(tree | {"bounds": [], "scoring": "final", "name": f"{tree['name']}-{name}"}, sort_keys=False)
