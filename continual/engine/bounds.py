"""Bounds beside a run: ordinary runs of the same configuration under another strategy, in RUN/bounds/NAME.

    bounds: [zero_shot, per_task, joint, per_instruction_lookup]        in the configuration

``zero_shot`` is the run's own stage 0 and takes no run. Each other one scores a stage's own task after it, and every
task at the end. They go on after a kill as any run does, and the report of RUN sets them beside it.
"""

from __future__ import annotations

from pathlib import Path

from continual.config.bounds import BOUNDS, FOLDER, configuration
from continual.storage import manifest


def run_bounds(run_dir: Path, accept_data: bool = False) -> None:
    """Run every bound of the run in ``run_dir`` that is not finished; with rows as they are now, if that is accepted.

    Raises:
        RunError: A stage of a bound failed; the run itself is finished.
    """
    state, text = manifest.read(run_dir)
    for name in state.bounds:
        if BOUNDS[name] is not None:
            _run(run_dir / FOLDER / name, configuration(text, name), accept_data)


def unfinished(run_dir: Path, names: list[str]) -> list[str]:
    """Return which of the bounds ``names`` of the run in ``run_dir`` still have stages to run."""
    folders = {name: run_dir / FOLDER / name for name in names if BOUNDS[name] is not None}
    return [name for name, folder in folders.items() if not (_begun(folder) and manifest.read(folder)[0].complete)]


def _begun(folder: Path) -> bool:
    return (folder / manifest.MANIFEST_NAME).is_file()


def _run(folder: Path, text: str, accept_data: bool) -> None:
    from continual.config import experiment
    from continual.engine.stage_loop import StageLoop

    state = None
    if _begun(folder):
        state, text = manifest.read(folder)
        if state.complete:
            return
    loop = StageLoop(experiment.parse(text, folder.name, where=str(folder)), folder)
    with loop.lock:
        loop.prepare(state, accept_data)
        loop.run()
