"""Take one atom at a time out of a finished run's bank and score its tasks again, into RUN/ablation.parquet.

    python -m continual.ablate RUN

The atom is missing from the routing of every block, and the others share its weight; nothing is trained again. Of a
growing bank, an atom is one of one slice, and a task none of whose rows use the slice keeps its scores unscored. The
table is written whole or not at all, and replaces an earlier one. The last line on standard output is the run's
directory. Exit status as for continual.run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from continual.errors import ConfigError
from continual.run import OneLineParser, guarded
from continual.runtime.quiet import quieten
from continual.storage import manifest, records

if TYPE_CHECKING:
    from continual.config.experiment import Experiment


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    return guarded(lambda: _work(sys.argv[1:] if argv is None else argv))


def ablate(run_dir: Path) -> None:
    """Write ``ablation.parquet`` into the directory of a finished run.

    Raises:
        ConfigError: There is no run, it is not finished, or its adapter has no atoms of which one could go.
    """
    state, text = manifest.read_finished(run_dir)
    quieten()
    from continual.commands.atom_scores import AtomScores
    from continual.config import experiment  # here: the error above should not have to wait for torch

    made = experiment.parse(text, state.run, where=str(run_dir / manifest.CONFIG_NAME))
    _check(made, run_dir)
    made.wordings, made.general_ability, made.token_sample = None, False, 0
    records.rewrite(run_dir, "ablation", AtomScores(made, run_dir).score(state))


def _check(experiment: Experiment, run_dir: Path) -> None:
    from continual.adapters import QueryableLoraConfig

    adapter = experiment.model.adapter
    if not isinstance(adapter, QueryableLoraConfig):
        raise ConfigError(
            f"{run_dir} has no atoms to take out: its adapter, {type(adapter).__name__}, keeps no bank of them"
        )
    if adapter.num_atoms == 1:
        raise ConfigError(f"{run_dir} has one atom (a slice): without it there is nothing to route to")


def _work(argv: Sequence[str]) -> Path:
    parser = OneLineParser(
        prog="python -m continual.ablate", description=str(__doc__).splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the directory of a finished run")
    run_dir: Path = parser.parse_args(argv).run
    ablate(run_dir)
    return run_dir


if __name__ == "__main__":
    sys.exit(main())
