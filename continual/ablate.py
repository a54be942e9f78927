"""Take one atom at a time out of a finished run's bank and score its tasks again, into RUN/ablation.parquet.

    python -m continual.ablate RUN [--accept-data]

The atom is missing from the routing of every block, and the others share its weight; nothing is trained again. Of a
growing bank, an atom is one of one slice, and a task none of whose rows use the slice keeps its scores unscored. The
table is written whole or not at all, and replaces an earlier one. The last line on standard output is the run's
directory. Exit status as for continual.run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from continual.commands.terminal import OneLineParser, guarded
from continual.runtime.quiet import quieten
from continual.storage import manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    return guarded(lambda: _work(sys.argv[1:] if argv is None else argv))


def _work(argv: Sequence[str]) -> Path:
    parser = OneLineParser(
        prog="python -m continual.ablate", description=str(__doc__).splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a finished run")
    parser.add_accept_data()
    arguments = parser.parse_args(argv)
    run_dir: Path = arguments.run
    manifest.read_finished(run_dir)  # what is wrong here need not wait for torch
    quieten()
    from continual.commands.ablate import ablate

    ablate(run_dir, arguments.accept_data)
    return run_dir


if __name__ == "__main__":
    sys.exit(main())
