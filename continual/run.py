"""Train one adapter across the stages of a configuration, and report what was learnt and what was forgotten.

    python -m continual.run configs/stages.yaml [--out DIR] [dotted.key=value ...]
    python -m continual.run --resume DIR [--accept-data]

The last line on standard output is the run's directory. Exit status: 0 done; 2 the configuration or an input is wrong;
1 something failed during the run, and what was finished is kept; 130 it was interrupted, 143 terminated, likewise.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from continual.commands.run import run
from continual.commands.terminal import OneLineParser, guarded


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    return guarded(lambda: _work(sys.argv[1:] if argv is None else argv))


def _work(argv: Sequence[str]) -> Path:
    parser = OneLineParser(prog="python -m continual.run", description=str(__doc__).splitlines()[0], allow_abbrev=False)
    parser.add_argument("config", nargs="?", help="the experiment's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="dotted.key=value", help="changes to the configuration")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run's directory (default: runs/NAME-TIME)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR")
    parser.add_accept_data()
    parser.add_argument("--no-report", action="store_true", help="leave the report to python -m analysis.report")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.resume and (arguments.config or arguments.out or arguments.overrides):
        parser.error("--resume takes no configuration, --out or override: the run goes on as it was configured")
    if arguments.accept_data and not arguments.resume:
        parser.error("--accept-data goes with --resume DIR: a new run takes its data as they are")
    if not arguments.resume and not arguments.config:
        parser.error("give a configuration file, or --resume DIR")
    from continual.runtime.quiet import quieten

    quieten()
    started = (arguments.config, arguments.out, arguments.overrides, arguments.resume)
    return run(*started, report=not arguments.no_report, accept_data=arguments.accept_data)


if __name__ == "__main__":
    sys.exit(main())
