"""Train one adapter across the stages of a configuration, and report what was learnt and what was forgotten.

    python -m continual.run configs/stages.yaml [--out DIR] [dotted.key=value ...]
    python -m continual.run --resume DIR

The last line on standard output is the run's directory. Exit status: 0 done; 2 the configuration or an input is wrong;
1 something failed during the run, and what was finished is kept; 130 it was interrupted, 143 terminated, likewise.
"""

from __future__ import annotations

import argparse
import gc
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from continual.errors import ConfigError, RunError, one_line

if TYPE_CHECKING:
    from continual.config.experiment import Experiment


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    return guarded(lambda: _work(sys.argv[1:] if argv is None else argv))


class OneLineParser(argparse.ArgumentParser):
    """Raises what is wrong with a command line, for ``guarded`` to print."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _work(argv: Sequence[str]) -> Path:
    parser = OneLineParser(prog="python -m continual.run", description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("config", nargs="?", help="the experiment's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="changes to the configuration")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's directory (default: runs/NAME-TIME)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR")
    parser.add_argument("--no-report", action="store_true", help="leave the report to python -m analysis.report")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.resume and (arguments.config or arguments.out or arguments.overrides):
        parser.error("--resume takes no configuration, --out or override: the run goes on as it was configured")
    if not arguments.resume and not arguments.config:
        parser.error("give a configuration file, or --resume DIR")
    from continual.runtime.quiet import quieten

    quieten()
    return run(arguments.config, arguments.out, arguments.overrides, arguments.resume, not arguments.no_report)


def run(
    config: str | Path | None,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    resume: Path | None = None,
    report: bool = True,
) -> Path:
    """Run a configuration file, or go on with a run; return the run's directory.

    Args:
        config: The experiment's YAML file, where a run is to be started.
        out: The new run's directory; runs/NAME-TIME if None.
        overrides: ``dotted.key=value`` changes to the configuration.
        resume: The directory of the run to go on with.
        report: Whether to draw the report at the end.

    Raises:
        ConfigError, TaskError: The configuration or an input is wrong; nothing was written.
        RunError: A stage failed; the stages before it are kept.
    """
    if resume is not None:
        return _go_on(resume, report)
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

    sequence = StageLoop(experiment, run_dir)
    sequence.prepare()
    sequence.run()
    run_dir = sequence.run_dir
    del sequence  # its model: the bounds load their own
    return finish(run_dir, report)


def _go_on(run_dir: Path, report: bool) -> Path:
    from continual.storage import manifest

    state, text = manifest.read(run_dir)
    if state.complete:
        from continual.engine.bounds import unfinished

        if left := unfinished(run_dir, state.bounds):
            print(f"Going on with the bounds of {run_dir}: {', '.join(left)}.")
            return finish(run_dir, report)
        print(f"All {len(state.stages)} stages of {run_dir} are finished: nothing to do.")
        if report and not (run_dir / "report" / "report.html").is_file():
            print(f"There is no report yet: python -m analysis.report {run_dir}")
        return run_dir

    import_engine()
    from continual.config import experiment
    from continual.engine.stage_loop import StageLoop

    sequence = StageLoop(experiment.parse(text, state.run, where=str(run_dir / manifest.CONFIG_NAME)), run_dir)
    sequence.prepare(state)
    print(f"Going on with {run_dir} after stage {state.finished_stage} of {len(state.stages)}.", flush=True)
    sequence.run()
    del sequence
    return finish(run_dir, report)


def finish(run_dir: Path, report: bool = True) -> Path:
    """Run the bounds that the configuration asks for, then write the report where one is wanted.

    Raises:
        RunError: A bound failed; the run is finished, and so is its report.
    """
    from continual.engine.bounds import run_bounds
    from continual.runtime import distributed

    try:
        run_bounds(run_dir)
    finally:
        if report and distributed.is_first():
            write_report(run_dir)
    return run_dir


def write_report(directory: Path) -> None:
    """Write the report of a run or a sweep; a report that fails does not undo what it would have told of."""
    from analysis import report

    try:
        print(f"Report: {report.write_report(directory)}")
    except Exception as error:  # the runs are done and on disk; say so, and let the report be drawn again
        print(f"the report failed: {one_line(error)}; try python -m analysis.report {directory}", file=sys.stderr)


def guarded(work: Callable[[], Path]) -> int:
    """Do the work, print the directory it returns, and turn errors and signals into one line and an exit status."""
    from continual.storage.records import RecordError
    from tasks import TaskError

    try:
        with _stopped_by_sigterm():
            print(work())
    except (ConfigError, TaskError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except (RunError, RecordError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit) as error:
        # Lightning turns the one into the other while a trainer is at work.
        cause = error if isinstance(error, KeyboardInterrupt) else error.__context__
        if not isinstance(cause, KeyboardInterrupt):
            raise
        terminated = isinstance(cause, _Terminated)
        print(f"{'terminated' if terminated else 'interrupted'}; go on with --resume", file=sys.stderr)
        return 143 if terminated else 130
    return 0


class _Terminated(KeyboardInterrupt):
    """SIGTERM came: from ``timeout``, a container that is stopped, or a cluster that wants its machine back."""


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Stop the work at SIGTERM.

    Left to themselves, Lightning's trainers go on scoring, and end a training as if all of it were done.
    """

    def stop(*_: Any) -> NoReturn:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():  # which alone takes signals
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
