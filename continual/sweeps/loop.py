"""A sweep at work in its directory: tune every method, run every cell, and keep count of both on disk.

    sweep.yaml, base.yaml       what was asked for, checked; running sweep.yaml gives the same sweep
    sweep.json                  {format, base, baseline, seeds, orders: {name: {stages, seeds}},
                                 methods: {name: {dotted key: value, those chosen by tuning included}},
                                 cells: [{method, order, seed, dir, status: done | failed | waiting, error, seconds}]}
    tuning.json                 {stages, validation_rows, seed, grid, methods: {name: {settings, score, at_edge: [keys],
                                 choice: index of the best cell, cells: [{dir, settings, score, scores, error,
                                 seconds}]}}}
    cells/METHOD/ORDER-seedN/   an ordinary run directory
    tuning/METHOD/NN/           another, its scores those of training rows held out
    configs/, logs/             the configuration and the output of each of them

Only the manifest of a run says that it is finished. A choice that tuning.json holds stands: cells were run with it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from continual.errors import DIVERGED, ConfigError
from continual.storage import manifest
from continual.storage.files import write_json, write_text
from continual.storage.lock import DirectoryLock
from continual.sweeps.cells import CellOutcome, CellRun, Engine, outcome_of, run_cells, visible_devices
from continual.sweeps.plan import BASE_NAME, SWEEP_NAME, Plan, Settings
from continual.sweeps.progress import SweepProgress

STATE_NAME = "sweep.json"
TUNING_NAME = "tuning.json"


class SweepLoop:
    """One sweep, ready to go on after the cells that are finished; ``num_run`` counts those that were still to run.

    Args:
        plan: The checked sweep.
        sweep_dir: Its directory, there already (see ``taken_up``).
        engine: What joblib spreads the cells with.
        num_jobs: Cells at a time.
    """

    def __init__(self, plan: Plan, sweep_dir: Path, engine: Engine, num_jobs: int) -> None:
        self.plan, self.sweep_dir, self.num_jobs = plan, sweep_dir, num_jobs
        self.engine: Engine = engine
        self.devices = visible_devices() if engine == "loky" else []
        self.num_run = 0
        self.outcomes: dict[str, CellOutcome] = {}
        self.settings = plan.methods
        self.tuning: dict[str, Any] = {}

    def run(self) -> dict[str, str]:
        """Run all that is not finished; return why cells failed, by their directories."""
        self._commit()
        self._tune()
        self.settings = {
            method: settings | (self.tuning.get(method, {}).get("settings") or {})
            for method, settings in self.plan.methods.items()
        }
        self._commit()
        cells = []
        for method, order, seed in self.plan.cells():
            place = _place(method, order, seed)
            if method in self.tuning and self.tuning[method]["choice"] is None:
                self.outcomes[place] = CellOutcome(place, _untuned(method, self.tuning[method]["cells"]))
                continue
            name, stages = f"{method}-{order}-seed{seed}", self.plan.orders[order].stages
            config = self.plan.configuration(name, self.settings[method], stages, seed)
            cells.append(self._cell(len(cells), place, config))
        self._run(cells, "cells")
        tuned = {cell["dir"]: cell["error"] for entry in self.tuning.values() for cell in entry["cells"]}
        ended = tuned | {place: outcome.error for place, outcome in self.outcomes.items()}
        return {place: error for place, error in ended.items() if error is not None}

    # -- tuning -------------------------------------------------------------------------------------------------------

    def _tune(self) -> None:
        tune, path = self.plan.tune, self.sweep_dir / TUNING_NAME
        if tune is None:
            return
        before = json.loads(path.read_text(encoding="utf-8"))["methods"] if path.exists() else {}
        settled = {method: entry for method, entry in before.items() if not _untried(entry["cells"])}
        combinations = {method: tune.combinations(method) for method in self.plan.methods if tune.values(method)}
        cells: dict[str, list[CellRun]] = {}
        for method, settings in combinations.items():
            if method not in settled:
                first = sum(map(len, cells.values()))
                configs = [self.plan.tuning_configuration(method, one) for one in settings]
                cells[method] = [
                    self._cell(first + number, f"tuning/{method}/{number:02d}", config)
                    for number, config in enumerate(configs)
                ]
        self._run([cell for group in cells.values() for cell in group], "tuning cells")
        for method, settings in combinations.items():
            self.tuning[method] = settled.get(method) or self._choice(method, settings, cells[method])
            self._say_choice(method)
        write_json(path, vars(tune) | {"methods": self.tuning})

    def _choice(self, method: str, combinations: list[Settings], cells: list[CellRun]) -> dict[str, Any]:
        """Return what tuning.json says of a method: the highest mean final score wins, the first of equal ones.

        There is no choice while a cell has failed for want of memory, say: methods are to be tuned alike. A value that
        makes the loss diverge has been tried, and lost.
        """
        assert self.plan.tune is not None
        entries = []
        for cell, settings in zip(cells, combinations, strict=True):
            outcome = self.outcomes.pop(cell.place)
            score = outcome.average if math.isfinite(outcome.average) else None
            told = {"score": score, "scores": outcome.scores, "error": outcome.error, "seconds": outcome.seconds}
            entries.append({"dir": cell.place, "settings": settings} | told)
        scored = [index for index, entry in enumerate(entries) if entry["score"] is not None]
        choice = None if _untried(entries) else max(scored, key=lambda index: entries[index]["score"], default=None)
        chosen = {"settings": None, "score": None} if choice is None else entries[choice]
        return {
            "settings": chosen["settings"],
            "score": chosen["score"],
            "at_edge": _at_edge(self.plan.tune.values(method), chosen["settings"] or {}),
            "choice": choice,
            "cells": entries,
        }

    def _say_choice(self, method: str) -> None:
        entry = self.tuning[method]
        if entry["choice"] is not None:
            chosen = ", ".join(f"{key}={value}" for key, value in entry["settings"].items())
            print(f"Chosen for {method}: {chosen} ({entry['score']:.3f} on held-out training rows)", flush=True)

    # -- cells --------------------------------------------------------------------------------------------------------

    def _cell(self, index: int, place: str, config: str) -> CellRun:
        trainer = yaml.safe_load(config).get("trainer") or {}
        asked = trainer.get("devices", 1)  # a cell of several devices sees all of them
        device = self.devices[index % len(self.devices)] if len(self.devices) > 1 and asked == 1 else None
        sweep_pid = os.getpid() if self.engine == "loky" else None
        return CellRun(self.sweep_dir.absolute(), place, config, Path.cwd(), device, sweep_pid)

    def _run(self, cells: list[CellRun], what: str) -> None:
        """Run the cells that are not finished, and tell of each as it ends."""
        found = [outcome_of(cell) for cell in cells]
        finished = {outcome.place: outcome for outcome in found if outcome.error is None}
        self.outcomes |= finished
        self._commit()
        rest = [cell for cell in cells if cell.place not in finished]
        if finished:
            nothing = "" if rest else ": nothing to do"
            print(f"{len(finished)} of {len(cells)} {what} are finished already{nothing}", flush=True)
        if not rest:
            return
        self.num_run += len(rest)
        with SweepProgress(rest, self.num_jobs) as progress:
            for number, outcome in enumerate(run_cells(rest, self.engine, self.num_jobs), start=len(finished) + 1):
                self.outcomes[outcome.place] = outcome
                self._commit()
                told = outcome.error or f"final average {outcome.average:.3f}, {outcome.seconds or 0:.1f} s"
                progress.end(outcome.place, f"[{number}/{len(cells)}] {outcome.place}: {told}")

    def _commit(self) -> None:
        plan = self.plan
        orders = {name: vars(order) for name, order in plan.orders.items()}
        seeds = sorted({seed for order in plan.orders.values() for seed in order.seeds})
        state = {"format": 1, "base": BASE_NAME, "baseline": plan.baseline, "seeds": seeds, "methods": self.settings}
        write_json(self.sweep_dir / STATE_NAME, state | {"orders": orders, "cells": [*map(self._told, plan.cells())]})

    def _told(self, key: tuple[str, str, int]) -> dict[str, Any]:
        place = _place(*key)
        outcome = self.outcomes.get(place)
        status = "waiting" if outcome is None else "done" if outcome.error is None else "failed"
        told = dict(zip(("method", "order", "seed"), key, strict=True)) | {"dir": place, "status": status}
        return told | {"error": outcome and outcome.error, "seconds": outcome and outcome.seconds}


@contextmanager
def taken_up(plan: Plan, sweep_dir: Path) -> Iterator[None]:
    """Make the sweep's directory, or take up the one at hand, and keep other processes from it meanwhile.

    Raises:
        ConfigError: The directory holds something else, another sweep, or one that a process is working on.
    """
    files = plan.files()
    if not (sweep_dir / SWEEP_NAME).exists():
        manifest.check_new(sweep_dir, set(files))
    with DirectoryLock(sweep_dir, "sweep") as lock:
        manifest.make(sweep_dir, lock)
        if not (sweep_dir / SWEEP_NAME).exists():
            manifest.check_new(sweep_dir, set(files))
            for name in sorted(files, key=SWEEP_NAME.__eq__):  # which comes last: without it there is no sweep
                write_text(sweep_dir / name, files[name])
        differing = [name for name, text in files.items() if _differs(sweep_dir / name, text)]
        if differing:
            raise ConfigError(f"{sweep_dir} holds another sweep ({' and '.join(differing)} differ): name another --out")
        yield


def _differs(path: Path, text: str) -> bool:
    return not path.is_file() or yaml.safe_load(path.read_text(encoding="utf-8")) != yaml.safe_load(text)


def _untried(entries: list[dict[str, Any]]) -> int:
    """Return how many tuning cells failed for a reason of their own, and would have to run again."""
    return sum(bool(entry["error"]) and DIVERGED not in entry["error"] for entry in entries)


def _untuned(method: str, entries: list[dict[str, Any]]) -> str:
    """Return why a method's cells do not run."""
    if failed := _untried(entries):
        return f"{failed} of the {len(entries)} tuning cells of {method} failed: it would not be tuned like the others"
    return f"every tuning cell of {method} diverged"


def _place(method: str, order: str, seed: int) -> str:
    return f"cells/{method}/{order}-seed{seed}"


def _at_edge(values: dict[str, list[Any]], chosen: Settings) -> list[str]:
    """Return the keys whose chosen number is the least or the greatest of several."""
    edges = []
    for key, choices in values.items():
        numeric = all(isinstance(choice, int | float) and not isinstance(choice, bool) for choice in choices)
        if key in chosen and numeric and len(set(choices)) > 1 and chosen[key] in (min(choices), max(choices)):
            edges.append(key)
    return edges
