"""Run a configuration, or go on with a run: the engine, then what follows the last stage."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from continual.commands.finish import finish

if TYPE_CHECKING:
    from continual.config.experiment import Experiment


def run(
    config: str | Path | None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    resume: Path | None = None,
    report: bool = True,
    accept_data: bool = False,
) -> Path:
    """Run a configuration file, or go on with a run; return the run's directory.

    Args:
        config: The experiment's YAML file, where a run is to be started.
        out: The new run's directory; runs/NAME-TIME if None.
        overrides: ``dotted.key=value`` changes to the configuration.
        resume: The directory of the run to go on with.
        report: Whether to draw the report at the end.
        accept_data: Go on with rows that are others than when the run began.

    Raises:
        ConfigError, TaskError: The configuration or an input is wrong; nothing was written.
        RunError: A stage failed; the stages before it are kept.
    """
    if resume is not None:
        return _go_on(resume, report, accept_data)
    assert config is not None
    import_engine()
    from continual.config import experiment

    run_dir = _new_dir(out, Path(config).stem)
    return _start(experiment.load(config, overrides), run_dir, report)


def run_text(text: str, stem: str, out: Path | None = None) -> Path:
    """Run a configuration given as text; see ``run``."""
    import_engine()
    from continual.config import experiment

    run_dir = _new_dir(out, stem)
    return _start(experiment.parse(text, stem), run_dir)


def import_engine() -> None:
    """Import what a run needs, once there is a run: a misspelt option or a finished run need not wait for torch.

    The garbage collector waits until all is there and then leaves it alone for good: it would look through the modules'
    million objects again and again, which is a quarter of the time until the first step.
    """
    if "continual.engine.stage_loop" in sys.modules:
        return
    gc.disable()
    try:
        import continual.engine.stage_loop  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def _new_dir(out: Path | None, stem: str) -> Path:
    from continual.storage import manifest

    run_dir = out or Path("runs") / f"{stem}-{datetime.now():%Y%m%d-%H%M%S}"
    manifest.check_new(run_dir)
    return run_dir


def _start(experiment: Experiment, run_dir: Path, report: bool = True) -> Path:
    from continual.engine.stage_loop import StageLoop

    loop = StageLoop(experiment, run_dir)
    with loop.lock as lock:
        loop.prepare()
        loop.run()
        run_dir = lock.directory
        del loop  # its model: the bounds load their own
        return finish(run_dir, report)


def _go_on(run_dir: Path, report: bool, accept_data: bool = False) -> Path:
    from continual.storage import manifest
    from continual.storage.lock import DirectoryLock

    state, text = manifest.read(run_dir)
    if state.complete:
        from continual.engine.bounds import unfinished

        if left := unfinished(run_dir, state.bounds):
            print(f"Going on with the bounds of {run_dir}: {', '.join(left)}.")
            with DirectoryLock(run_dir) as lock:
                lock.acquire()
                return finish(run_dir, report, accept_data)
        print(f"All {len(state.stages)} stages of {run_dir} are finished: nothing to do.")
        if report and not (run_dir / "report" / "report.html").is_file():
            print(f"There is no report yet: python -m analysis.report {run_dir}")
        return run_dir

    import_engine()
    from continual.config import experiment
    from continual.engine.stage_loop import StageLoop

    loop = StageLoop(experiment.parse(text, state.run, where=str(run_dir / manifest.CONFIG_NAME)), run_dir)
    with loop.lock:
        if state.format < manifest.FORMAT:
            print(f"{run_dir} was begun by an older version, without digests: what it left is taken as it is.")
        loop.prepare(state, accept_data)
        print(f"Going on with {run_dir} after stage {state.finished_stage} of {len(state.stages)}.", flush=True)
        loop.run()
        del loop
        return finish(run_dir, report, accept_data)
