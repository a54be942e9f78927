"""What a sweep file asks for: read, checked before anything runs, and turned into one configuration a cell.

    base: mixed.yaml                      a run's configuration, relative to the sweep file
    set: {dotted.key: value}              changes to it for every cell
    baseline: lora                        the method that the others are compared with
    methods: {lora: {dotted.key: value}, bank: {...}}
    seeds: [0, 1, 2]                      for every order that names none of its own; [0] if not given
    orders: {first: {stages: [mnli, yelp], seeds: [0]}}        the base's own order, named "base", if not given
    tune:                                 optional: settings chosen on training rows held out, one choice a method
      stages: [mnli, snips]
      validation_rows: 200
      seed: 0
      grid: {"*": {dotted.key: [values]}, ewc: {dotted.key: [values]}}       "*" is for every method

A later one wins: base, set, the command line's overrides, the method, what tuning chose, the cell's seed. A seed is the
run's and that of every task that takes one. A value is any YAML; 1e-3 is a number here.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from continual.config import experiment
from continual.config.overrides import read_text, read_tree, set_key
from continual.errors import ConfigError, one_line
from continual.sweeps import checks

SWEEP_NAME = "sweep.yaml"
BASE_NAME = "base.yaml"
ALL_METHODS = "*"
_KEYS = ("base", "set", "baseline", "methods", "seeds", "orders", "tune")
_OF_A_CELL = ("name", "seed", "stages")
_TUNE_KEYS = ("stages", "validation_rows", "seed", "grid")

Settings = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in jsonargparse; plain YAML 1.1 reads a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class Order:
    """The stages of a run in training order, and the seeds to run them with."""

    stages: list[str]
    seeds: list[int]


@dataclass(frozen=True)
class Tuning:
    """How settings are chosen.

    Attributes:
        stages: Stages that a tuning cell trains on.
        validation_rows: Training rows of each that are held out, to be scored on.
        seed: The seed of every tuning cell.
        grid: Values to try: of each method ("*": of all), of each dotted key.
    """

    stages: list[str]
    validation_rows: int
    seed: int
    grid: dict[str, dict[str, list[Any]]]

    def values(self, method: str) -> dict[str, list[Any]]:
        """Return the values to try for each dotted key of a method."""
        return self.grid.get(ALL_METHODS, {}) | self.grid.get(method, {})

    def combinations(self, method: str) -> list[Settings]:
        """Return every combination of a method's values, the last key changing fastest; none where nothing is tuned."""
        values = self.values(method)
        return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())] if values else []


@dataclass(frozen=True)
class Plan:
    """A checked sweep.

    Attributes:
        base: The base configuration's tree, with what is changed for every cell.
        baseline: The method that others are compared with.
        methods: Dotted keys and values of each method.
        orders: The orders, by name.
        tune: How settings are chosen; None where none are.
    """

    base: dict[str, Any]
    baseline: str
    methods: dict[str, Settings]
    orders: dict[str, Order]
    tune: Tuning | None = None

    def cells(self) -> list[tuple[str, str, int]]:
        """Return (method, order, seed) of every cell; methods change fastest, so that comparisons come early."""
        runs = [(name, seed) for name, order in self.orders.items() for seed in order.seeds]
        return [(method, order, seed) for order, seed in runs for method in self.methods]

    @property
    def stages(self) -> list[str]:
        """Every stage that is in an order."""
        return list(dict.fromkeys(stage for order in self.orders.values() for stage in order.stages))

    def configuration(self, name: str, settings: Settings, stages: Iterable[str], seed: int) -> str:
        """Return the base with settings, stages and a seed, as YAML."""
        tree = copy.deepcopy(self.base)
        for key, value in settings.items():
            set_key(tree, key, value)
        by_name = {stage["name"]: stage for stage in tree["stages"]}
        tree["stages"] = [by_name[stage] for stage in stages]
        tree["name"], tree["seed"] = name, seed
        for stage in tree["stages"]:
            if _takes_seed(stage.get("task")):
                set_key(stage, "task.init_args.seed", seed)
        return _text(tree)

    def tuning_configuration(self, method: str, settings: Settings) -> str:
        """Return the configuration of a tuning cell: test rows are neither trained on nor scored.

        What stands beside a run's own scores (bounds, reworded prompts, untouched text, tokens) chooses no setting and
        is left out.
        """
        assert self.tune is not None
        held_out = {"data.validation_rows": self.tune.validation_rows, "data.score_rows": "held_out"}
        alone = {"bounds": [], "wordings": None, "general_ability": False, "token_sample": 0}
        settings = self.methods[method] | settings | held_out | alone
        return self.configuration(f"{method}-tuning", settings, self.tune.stages, self.tune.seed)

    def files(self) -> dict[str, str]:
        """Return the sweep as files, by name, that describe it whole: running them gives the same sweep."""
        tree: dict[str, Any] = {"base": BASE_NAME, "baseline": self.baseline, "methods": self.methods}
        tree["orders"] = {name: vars(order) for name, order in self.orders.items()}
        if self.tune is not None:
            tree["tune"] = vars(self.tune)
        return {SWEEP_NAME: _text(tree), BASE_NAME: _text(self.base)}


def load(path: str | Path, overrides: Sequence[str] = (), tuning: Path | None = None) -> Plan:
    """Read a sweep file and check all of it, every method's configuration and every value of the grid included.

    Args:
        path: The sweep file.
        overrides: ``dotted.key=value`` changes to the base, after those of ``set``.
        tuning: Another sweep's tuning.json, whose choices are taken in the place of tuning.

    Raises:
        ConfigError: Anything wrong, in one line that names the file and the key.
    """
    path = Path(path)
    where = str(path)
    try:
        tree = yaml.load(read_text(path), Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {one_line(error)}") from error
    with checks.at(where):
        tree = checks.mapping(tree, "the sweep", _KEYS, required=("base", "baseline", "methods"))
        if not isinstance(tree["base"], str):
            raise ConfigError(f"base has to name a configuration file, got {tree['base']!r}")
        methods = _methods(tree["methods"])
        checks.known([tree["baseline"]], methods, "baseline", "method")
        base = _base(path.parent / tree["base"], checks.mapping(tree.get("set") or {}, "set"), overrides)
        names = [stage["name"] for stage in base["stages"]]
        plan = Plan(base, tree["baseline"], methods, _orders(tree, names), _tuning(tree, names, methods))
    if tuning is not None:
        plan = replace(plan, methods=_chosen(tuning, methods), tune=None)
    _check_configurations(plan, where)
    return plan


def _chosen(path: Path, methods: Mapping[str, Settings]) -> dict[str, Settings]:
    """Return the methods with the settings that another sweep chose for each."""
    try:
        entries = json.loads(read_text(path))["methods"]
        choices = {name: entry["settings"] for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not the tuning.json of a sweep: {one_line(error)}") from error
    for name in methods:
        if choices.get(name) is None:
            raise ConfigError(f"{path} holds no settings for the method {name}: it would not be tuned like the others")
    return {name: settings | choices[name] for name, settings in methods.items()}


def _base(path: Path, changes: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    tree = read_tree(read_text(path), where=str(path))
    with checks.at("set"):
        for key, value in changes.items():
            set_key(tree, key, value)
    return read_tree(_text(tree), overrides, str(path))


def _methods(given: Any) -> dict[str, Settings]:
    methods = {checks.folder(name, "methods"): value for name, value in checks.mapping(given, "methods").items()}
    if not methods:
        raise ConfigError("methods is empty: the sweep has no cells")
    for name, settings in methods.items():
        for key in checks.mapping(settings or {}, f"methods.{name}"):
            if key in _OF_A_CELL:
                raise ConfigError(f"methods.{name} sets {key}, which every cell has of its own")
    return {name: dict(settings or {}) for name, settings in methods.items()}


def _orders(tree: Mapping[str, Any], names: list[str]) -> dict[str, Order]:
    given = checks.mapping(tree.get("orders", {"base": {}}), "orders")
    if not given:
        raise ConfigError("orders is empty: the sweep has no cells")
    orders = {}
    for name, order in given.items():
        place = f"orders.{checks.folder(name, 'orders')}"
        order = checks.mapping(order or {}, place, ("stages", "seeds"))
        stages = checks.stages(order.get("stages", names), names, f"{place}.stages")
        own = "seeds" in order
        seeds = checks.seeds(order["seeds"] if own else tree.get("seeds", [0]), f"{place}.seeds" if own else "seeds")
        orders[str(name)] = Order(stages, seeds)
    return orders


def _tuning(tree: Mapping[str, Any], names: list[str], methods: Iterable[str]) -> Tuning | None:
    if tree.get("tune") is None:
        return None
    tune = checks.mapping(tree["tune"], "tune", _TUNE_KEYS, required=("stages", "validation_rows", "grid"))
    rows = tune["validation_rows"]
    if type(rows) is not int or rows < 1:
        raise ConfigError(f"tune.validation_rows must be an integer of at least 1, got {rows!r}")
    grid = checks.mapping(tune["grid"], "tune.grid")
    checks.known(grid, [ALL_METHODS, *methods], "tune.grid", "method")
    for method, values in grid.items():
        for key, choices in checks.mapping(values, f"tune.grid.{method}").items():
            if not isinstance(choices, list) or not choices:
                raise ConfigError(f"tune.grid.{method}: {key} has to list the values to try, got {choices!r}")
    (seed,) = checks.seeds([tune.get("seed", 0)], "tune.seed")
    return Tuning(checks.stages(tune["stages"], names, "tune.stages"), rows, seed, dict(grid))


def _check_configurations(plan: Plan, where: str) -> None:
    """Parse every method once, on all stages, and once with every value that it may be tuned to."""
    for method, settings in plan.methods.items():
        place = f"{where}: methods.{method}"
        with checks.at(place):
            text = plan.configuration(method, settings, plan.stages, 0)
        experiment.parse(text, method, where=place)
        for key, values in plan.tune.values(method).items() if plan.tune else ():
            for value in values:
                place = f"{where}: tune.grid for {method}"
                with checks.at(place):
                    text = plan.tuning_configuration(method, {key: value})
                experiment.parse(text, method, where=place)


def _takes_seed(task: Any) -> bool:
    """Say whether a task's class takes a seed; False for what the parser will refuse."""
    path = task.get("class_path") if isinstance(task, dict) else None
    module, _, name = str(path).rpartition(".")
    try:
        return "seed" in inspect.signature(getattr(importlib.import_module(module), name)).parameters
    except (ImportError, AttributeError, ValueError, TypeError):
        return False


class _Dumper(yaml.SafeDumper):
    """Writes a value that stands in two places twice, for a person to read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(tree: Any) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
