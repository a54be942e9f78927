"""Run methods x task orders x seeds, tuned alike, and keep every run: analysis.report sets them side by side.

    python -m continual.sweep sweep.yaml [--out DIR] [--tuning FILE] [--jobs N] [--engine ray] [dotted.key=value ...]
    python -m continual.sweep --resume DIR [--jobs N] [--engine loky|ray]

``sweeps.plan`` says what a sweep file holds, ``sweeps.loop`` what its directory does. A sweep that was killed goes on
with --resume, or with the same --out again: finished cells are kept, interrupted ones go on after their last stage.
With --report the sweep's report is written at the end, as ``python -m analysis.report DIR`` does at any time.
The last line on standard output is the sweep's directory. Exit status: 0 done; 2 the sweep or an input is wrong and
nothing was run; 1 cells failed, each named with the reason, and the others are done.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from continual.commands.finish import write_report
from continual.commands.terminal import OneLineParser, guarded
from continual.errors import ConfigError
from continual.sweeps.cells import Engine, choose_jobs, start_engine

if TYPE_CHECKING:
    from continual.sweeps.loop import SweepLoop


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    failed: dict[str, str] = {}
    code = guarded(lambda: _work(sys.argv[1:] if argv is None else argv, failed))
    return code or int(bool(failed))


def _work(argv: Sequence[str], failed: dict[str, str]) -> Path:
    parser = OneLineParser(
        prog="python -m continual.sweep", description=str(__doc__).splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("config", nargs="?", help="the sweep's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="changes to the base configuration")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the sweep's directory (default: runs/NAME-TIME)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the sweep in DIR")
    parser.add_argument("--tuning", type=Path, metavar="FILE", help="take what another sweep's tuning.json chose")
    parser.add_argument("--jobs", type=int, metavar="N", help="cells at a time (default: one a GPU, or half the cores)")
    parser.add_argument("--engine", choices=get_args(Engine), default="loky", help="what spreads the cells")
    parser.add_argument("--report", action="store_true", help="write the sweep's report once its cells have run")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.resume and arguments.out:
        parser.error("--resume names the sweep's directory already: leave --out away")
    if arguments.resume and arguments.tuning:
        parser.error("--resume goes on with the settings that the sweep has: leave --tuning away")
    if not arguments.resume and not arguments.config:
        parser.error("give a sweep file, or --resume DIR")
    if arguments.jobs is not None and arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    from continual.runtime.quiet import quieten

    quieten()
    from continual.sweeps.plan import SWEEP_NAME

    saved = None if arguments.resume is None else arguments.resume / SWEEP_NAME
    if saved is not None and not saved.is_file():
        raise ConfigError(f"{arguments.resume} holds no sweep to resume: {SWEEP_NAME} is missing")
    config = Path(arguments.config) if arguments.config else saved
    assert config is not None
    sweep_dir = arguments.resume or arguments.out or Path("runs") / f"{config.stem}-{datetime.now():%Y%m%d-%H%M%S}"
    options = (arguments.engine, arguments.jobs, arguments.tuning, arguments.report)
    failed.update(run(config, sweep_dir, arguments.overrides, *options))
    return sweep_dir


def run(
    config: Path,
    sweep_dir: Path,
    overrides: Sequence[str] = (),
    engine: Engine = "loky",
    jobs: int | None = None,
    tuning: Path | None = None,
    report: bool = False,
) -> dict[str, str]:
    """Run a sweep, or go on with it; return why cells failed, by their directories within the sweep's.

    Args:
        config: The sweep file.
        sweep_dir: The sweep's directory: new, or that of the same sweep.
        overrides: ``dotted.key=value`` changes to the base configuration.
        engine: What joblib spreads the cells with.
        jobs: Cells at a time; see ``sweeps.cells.choose_jobs`` for the default.
        tuning: Another sweep's tuning.json, whose choices are taken in the place of tuning.
        report: Whether to write the sweep's report; one that is there stays where no cell had to run.

    Raises:
        ConfigError: The sweep or an input is wrong; nothing was run.
        RunError: A worker died.
    """
    from continual.sweeps import plan as sweep_plan
    from continual.sweeps.loop import SweepLoop, taken_up

    plan = sweep_plan.load(config, overrides, tuning)
    start_engine(engine)
    sweep = SweepLoop(plan, sweep_dir, engine, choose_jobs(engine, jobs))
    with taken_up(plan, sweep_dir):
        _say_plan(sweep)
        failed = sweep.run()
    _say_end(sweep, failed)
    if report:
        page = sweep_dir / "report" / "report.html"
        if sweep.num_run or not page.is_file():
            write_report(sweep_dir)
        else:
            print(f"Report: {page}")
    return failed


def _say_plan(sweep: SweepLoop) -> None:
    plan = sweep.plan
    num_tuning = sum(len(plan.tune.combinations(method)) for method in plan.methods) if plan.tune else 0
    before = f", after {num_tuning} tuning cells" if num_tuning else ""
    print(f"Sweep {sweep.sweep_dir}: {len(plan.cells())} cells{before}; {sweep.num_jobs} at a time on {sweep.engine}")
    print(f"  {len(plan.methods)} methods: {', '.join(plan.methods)} (baseline {plan.baseline})")
    for name, order in plan.orders.items():
        print(f"  order {name}, seeds {', '.join(map(str, order.seeds))}: {' > '.join(order.stages)}", flush=True)


def _say_end(sweep: SweepLoop, failed: dict[str, str]) -> None:
    for method, entry in sweep.tuning.items():
        for key in entry["at_edge"]:
            print(f"{method}: {key}={entry['settings'][key]} lies at the edge of its grid; a wider one may do better")
    if failed:
        print(f"{len(failed)} cells failed:", file=sys.stderr)
        for place, error in failed.items():
            print(f"  {place}: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
