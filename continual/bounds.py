"""Bounds beside a run: ordinary runs of the same configuration under another strategy, in RUN/bounds/NAME.

    bounds: [zero_shot, per_task, joint, per_instruction_lookup]        in the configuration

``zero_shot`` is the run's own stage 0 and takes no run. Each other one scores a stage's own task after it, and every
task at the end. They go on after a kill as any run does, and the report of RUN sets them beside it.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from continual import manifest
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


def run_bounds(run_dir: Path) -> None:
    """Run every bound of the run in ``run_dir`` that is not finished.

    Raises:
        RunError: A stage of a bound failed; the run itself is finished.
    """
    state, text = manifest.read(run_dir)
    for name in state.bounds:
        if BOUNDS[name] is not None:
            _run(run_dir / FOLDER / name, configuration(text, name))


def unfinished(run_dir: Path, names: list[str]) -> list[str]:
    """Return which of the bounds ``names`` of the run in ``run_dir`` still have stages to run."""
    folders = {name: run_dir / FOLDER / name for name in names if BOUNDS[name] is not None}
    return [name for name, folder in folders.items() if not (_begun(folder) and manifest.read(folder)[0].complete)]


def _begun(folder: Path) -> bool:
    return (folder / manifest.MANIFEST_NAME).is_file()


def _run(folder: Path, text: str) -> None:
    from continual import experiment
    from continual.sequence import Sequence

    state = None
    if _begun(folder):
        state, text = manifest.read(folder)
        if state.complete:
            return
    sequence = Sequence(experiment.parse(text, folder.name, where=str(folder)), folder)
    sequence.prepare(state)
    sequence.run()
