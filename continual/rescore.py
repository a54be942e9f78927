"""Score a finished run's tasks under reworded prompts, add the rows to its tables, and draw its report again.

    python -m continual.rescore RUN --wordings FILE [--key KEY] [--options kept ...] [--where gate both]
                                    [--no-none] [--no-wrong] [--accept-data]

Rows of the same wording from an earlier call are replaced. The last line on standard output is the run's directory.
Exit status as for continual.run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from continual.commands.finish import finish
from continual.commands.terminal import OneLineParser, guarded
from continual.data.prompt_variants import Options, Where
from continual.runtime.quiet import quieten
from continual.storage import manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    return guarded(lambda: _work(sys.argv[1:] if argv is None else argv))


def _work(argv: Sequence[str]) -> Path:
    parser = OneLineParser(
        prog="python -m continual.rescore", description=str(__doc__).splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a finished run")
    parser.add_argument("--wordings", metavar="FILE", help="JSON file of paraphrases, by task name")
    parser.add_argument("--key", help="the name in FILE whose paraphrases are every task's")
    kept = list(get_args(Options))
    parser.add_argument("--options", nargs="+", choices=kept, default=kept, help="what becomes of the options")
    parser.add_argument("--where", nargs="+", choices=get_args(Where), default=["gate", "both"], help="who gets them")
    for name, what in (("none", "with no instruction"), ("wrong", "with another task's instruction")):
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, default=True, help=f"score {what}")
    parser.add_accept_data()
    arguments = parser.parse_args(argv)
    if not (arguments.wordings or arguments.none or arguments.wrong):
        parser.error("nothing to score: give --wordings FILE, or leave --no-none or --no-wrong away")
    manifest.read_finished(arguments.run)  # what is wrong here need not wait for torch
    quieten()
    from continual.commands.rescore import rescore

    words = (arguments.wordings, arguments.key, arguments.options, arguments.where, arguments.none, arguments.wrong)
    rescore(arguments.run, *words, accept_data=arguments.accept_data)
    return finish(arguments.run)


if __name__ == "__main__":
    sys.exit(main())
