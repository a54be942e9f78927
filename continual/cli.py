"""Lightning's command line over the same classes: one stage by hand, or the whole sequence.

python -m continual.cli fit --config configs/one_stage.yaml            one stage (also: validate, test, predict)
python -m continual.cli run-stages --config configs/stages.yaml        the sequence, as continual.run runs it
python -m continual.cli run-stages --config configs/stages.yaml --print_config
python -m continual.cli fit --help
python -m continual.cli bank RUN list                                  a growing bank: see ``continual.bank``
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from continual.commands import bank, run
from continual.commands.terminal import OneLineParser, guarded
from continual.compat.jsonargparse import keys_of, subcommands_of
from continual.config.experiment import TRAINER_DEFAULTS, Stage, check_optimizer, make_parser
from continual.config.messages import RUN_STAGES, explain
from continual.data.stage_data import StageData
from continual.errors import ConfigError
from continual.runtime.quiet import quieten
from continual.training.module import ContinualModule

BANK = "bank"
_OWN_KEYS = ("config", "out", "resume")

# A stage by hand is an ordinary Lightning run, with Lightning's own bar and checkpoints.
_STAGE_DEFAULTS = {
    k: v for k, v in TRAINER_DEFAULTS.items() if k not in ("enable_progress_bar", "enable_checkpointing")
}


class ContinualCLI(LightningCLI):
    """LightningCLI with one subcommand more, which needs neither its seed nor its trainer.

    Three of the methods overridden here are not part of Lightning's public interface: ``compat.overrides`` lists them.
    """

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser that raises what is wrong and takes no shortened names: max_epoch is no max_epochs."""
        return super().init_parser(**{"exit_on_error": False, "allow_abbrev": False} | kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, with what is wrong on one line."""
        try:
            super().parse_arguments(parser, args)
        except ArgumentError as error:
            raise ConfigError(explain(error, {}, Stage, keys_of(make_parser()))) from error
        if (chosen := self.config.get("subcommand")) not in (None, RUN_STAGES):
            check_optimizer(self.config[chosen].get("model.optimizer"))

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        action = subcommands_of(parser)
        description = "Train one adapter across the stages of a configuration, and report what was forgotten."
        stages = make_parser(self.init_parser(description=description))
        stages.add_argument(
            "--out", type=str | None, default=None, help="The run's directory (default: runs/NAME-TIME)."
        )
        stages.add_argument("--resume", type=str | None, default=None, help="Go on with the run in this directory.")
        action.add_subcommand(RUN_STAGES, stages, help=description)
        # For the list of subcommands; ``main`` hands the command itself to ``continual.bank``.
        action.add_subcommand(BANK, self.init_parser(), help=str(bank.__doc__).splitlines()[0])

    def _set_seed(self) -> None:
        if self.subcommand != RUN_STAGES:
            super()._set_seed()

    def instantiate_classes(self) -> None:
        """Build the module, the data and the trainer of a stage; the sequence builds its own."""
        if self.subcommand != RUN_STAGES:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand != RUN_STAGES:
            super()._run_subcommand(subcommand)


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; return the exit status."""
    quieten()
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == [BANK]:
        return guarded(lambda: bank.main(argv[1:]))
    if argv[:1] == [RUN_STAGES] and not {"--help", "-h"} & set(argv):
        return guarded(lambda: _run_stages(argv))
    return guarded(lambda: _run_stage(argv))


def _run_stage(argv: list[str]) -> Path:
    cli = _build(argv)
    return Path(cli.trainer.default_root_dir)


def _run_stages(argv: list[str]) -> Path:
    resuming = OneLineParser(prog=f"python -m continual.cli {RUN_STAGES}", add_help=False, allow_abbrev=False)
    resuming.add_argument("--resume", type=Path)
    known, others = resuming.parse_known_args(argv[1:])
    if known.resume and others:
        raise ConfigError("--resume takes nothing beside it: the run goes on as it was configured")
    if known.resume:
        return run.run(None, resume=known.resume)
    cli = _build(argv)
    config = cli.config[RUN_STAGES]
    stem = Path(str(config.config[-1])).stem if config.config else "stages"
    kept = config.clone()
    for key in _OWN_KEYS:
        kept.pop(key, None)
    return run.run_text(make_parser().dump(kept, skip_none=False), stem, Path(config.out) if config.out else None)


def _build(argv: list[str]) -> ContinualCLI:
    return ContinualCLI(
        ContinualModule,
        StageData,
        save_config_callback=None,
        trainer_defaults=_STAGE_DEFAULTS,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,
        args=_as_args(argv),
    )


def _as_args(argv: list[str]) -> ArgsType:
    sys.argv[1:] = argv  # LightningCLI warns where both are given and differ
    return None


if __name__ == "__main__":
    sys.exit(main())
