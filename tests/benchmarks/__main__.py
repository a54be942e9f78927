"""Benchmarks: each ratio from subjects that take turns in one process; a line of JSON a figure, and a table at the end.

    python tests/benchmarks [SUITE ...] [--device cuda] [--tiny] [--seed 0] [--rounds N] [--only WORDS] [--out FILE]

Figures go to standard output as they come; the table follows. With ``--tiny`` sizes are such that all of it takes
seconds, to see that the benchmarks work: those figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import Result, Setting, table

from continual.runtime.quiet import quieten

SUITES = ("training", "stage", "scoring", "growth", "quantized", "devices")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suites asked for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python tests/benchmarks", description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "suites", nargs="*", choices=[*SUITES, []], metavar="SUITE", help=f"of {', '.join(SUITES)}; all"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="cpu or cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes that take seconds")
    parser.add_argument("--seed", type=int, default=0, help="decides weights, rows and tokens")
    parser.add_argument("--rounds", type=int, help="rounds of turns; each benchmark has its own number")
    parser.add_argument("--only", default="", metavar="WORDS", help="leave out cases whose name lacks these words")
    parser.add_argument("--out", type=Path, help="write the lines of JSON here too")
    given = parser.parse_args(argv)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    quieten()
    setting = Setting(torch.device(given.device), given.tiny, given.seed, given.rounds, given.only)
    results: list[Result] = []
    with given.out.open("w", encoding="utf-8") if given.out else open(os.devnull, "w") as out:
        for suite in given.suites or SUITES:
            for result in importlib.import_module(f"bench_{suite}").run(setting):
                results.append(result)
                for stream in (sys.stdout, out):
                    print(result.line(setting), file=stream, flush=True)
    print(table(results, setting))
    return 0


if __name__ == "__main__":
    sys.exit(main())
