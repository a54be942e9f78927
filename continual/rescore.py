"""Score a finished run's tasks in other words, add the rows to its tables, and draw its report again.

    python -m continual.rescore RUN --wordings FILE [--key KEY] [--options kept ...] [--where gate both]
                                    [--no-none] [--no-wrong]

Rows of the same wording from an earlier call are replaced. The last line on standard output is the run's directory.
Exit status as for continual.run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from continual.data.prompt_variants import Options, Where
from continual.run import OneLineParser, finish, guarded
from continual.runtime.quiet import quieten
from continual.storage import manifest, records

_SAME = ["run", "seed", "stage", "task", "wording", "where", "options"]


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
    arguments = parser.parse_args(argv)
    if not (arguments.wordings or arguments.none or arguments.wrong):
        parser.error("nothing to score: give --wordings FILE, or leave --no-none or --no-wrong away")
    state, text = manifest.read_finished(arguments.run)
    quieten()
    from continual.config import experiment  # here: neither of the errors above should have to wait for torch
    from continual.engine.stage_loop import StageLoop
    from continual.scoring.rewording import Rewording

    made = experiment.parse(text, state.run, where=str(arguments.run / manifest.CONFIG_NAME))
    made.wordings = Rewording(
        arguments.wordings, arguments.key, arguments.options, arguments.where, arguments.none, arguments.wrong
    )
    loop = StageLoop(made, arguments.run)
    loop.prepare(state)
    tables = loop.score_reworded()
    for table in ("wording_answers", "wordings"):
        records.replace(arguments.run, table, tables[table], _SAME)
    return finish(arguments.run)


if __name__ == "__main__":
    sys.exit(main())
