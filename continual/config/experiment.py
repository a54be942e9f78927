"""An experiment as its configuration file describes it: parse, override, check, and write out what was resolved.

    name: stages                                             the file's stem unless given
    seed: 0
    scoring: all                                             all | seen | final: which tasks are scored after a stage
    bounds: []                                               runs to set beside this one: ``continual.engine.bounds``
    model: {backbone: ..., adapter: ..., optimizer: ...}     arguments of ContinualModule
    data: {batch_size: 8, ...}                               arguments of StageData, for every stage
    trainer: {max_epochs: 1, ...}                            arguments of lightning's Trainer, a fresh one each stage
    token_sample: 256                                        tokens a task whose routes are kept one by one; 0: none
    general_ability: false                                   score untouched text after every stage too
    best_checkpoint: false                                   score a stage's best epoch in training beside its last
    theory: false                                            measure how near the theory's bounds come to be reached
    wordings: {file: ..., ...}                               arguments of Rewording; null (the default) for none
    recorders: [{class_path: ..., init_args: {...}}, ...]    recorders of one's own: ``interfaces.Recorder``
    stages: [{name: ..., task: {class_path: ..., init_args: {...}}}, ...]

Classes are named by class_path and init_args; a constructor's signature is its configuration.
"""

from __future__ import annotations

import copy
import functools
import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy

from continual.compat.jsonargparse import keys_of
from continual.compat.lightning import ignore_sigterm
from continual.config import bounds
from continual.config.messages import explain
from continual.config.overrides import read_text, read_tree
from continual.data.stage_data import StageData
from continual.errors import ConfigError, one_line
from continual.interfaces import Recorder
from continual.runtime import distributed
from continual.scoring.rewording import Rewording
from continual.storage import manifest
from continual.training.module import ContinualModule
from tasks import Task

# What Lightning would do by default and a sequence of stages must not: 1,000 epochs, a logger, checkpoints of its own.
TRAINER_DEFAULTS = {
    "max_epochs": 1,
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,  # the sequence has a bar of its own
    "num_sanity_val_steps": 0,
    "gradient_clip_val": 1.0,
    "use_distributed_sampler": False,  # batches are split over devices by ``batches.Collator``
}


Scoring = Literal["all", "seen", "final"]


@dataclass
class Stage:
    """One stage: a task to train on.

    Args:
        name: The stage's name, and its task's name in every table.
        task: The task.
        max_epochs: Epochs of this stage; the trainer's when not given.
    """

    name: str
    task: Task
    max_epochs: PositiveInt | None = None  # type: ignore[valid-type]


@dataclass
class Experiment:
    """A checked configuration, with its objects built.

    Attributes:
        name: The run's name: the configuration's and a hash of what was resolved.
        seed: Decides everything random.
        threads: CPU threads; torch's default when not given. CPU results depend on it.
        model: The module, not yet loaded.
        data: Arguments of every stage's StageData.
        trainer: Arguments of every stage's Trainer.
        stages: The stages, in training order.
        scoring: What is scored after each stage: "all" tasks, those "seen" so far, or with "final" the stage's own
            alone. Before training and after the last stage, every task is.
        token_sample: How many tokens of each task's test prompts are kept with their routes; 0 for none.
        general_ability: Whether the log-likelihood of untouched text is measured after every stage.
        best_checkpoint: Whether a stage's task is scored under the epoch of best training accuracy too.
        theory: Whether the ratios of the theory's bounds are measured in training.
        wordings: Reworded prompts to score the finished model's tasks under, if any.
        recorders: Recorders of the user's own.
        bounds: Names of the bounds to run beside it.
        resolved: The whole configuration with every default filled in, as YAML; running it gives the same run.
    """

    name: str
    seed: int
    threads: int | None
    model: ContinualModule
    data: dict[str, Any]
    trainer: dict[str, Any]
    stages: list[Stage]
    resolved: str
    scoring: Scoring = "all"
    token_sample: int = 256
    general_ability: bool = False
    best_checkpoint: bool = False
    theory: bool = False
    wordings: Rewording | None = None
    recorders: list[Recorder] = field(default_factory=list)
    bounds: list[str] = field(default_factory=list)

    def epochs(self, stage: Stage) -> int:
        """Return the epochs of a stage."""
        return stage.max_epochs or self.trainer["max_epochs"]

    def make_trainer(self, stage: Stage | None, run_dir: Path, callbacks: Sequence[L.Callback]) -> L.Trainer:
        """Return a fresh Trainer: a second fit of one that has run trains nothing, without a word.

        Raises:
            ConfigError: Lightning refuses the arguments, or this machine lacks what they ask for.
        """
        arguments = copy.deepcopy(self.trainer)
        own = arguments.pop("callbacks", None) or []
        own = list(own) if isinstance(own, Sequence) else [own]
        if stage is not None:
            arguments["max_epochs"] = self.epochs(stage)
        arguments |= {"default_root_dir": str(run_dir), "limit_val_batches": 0, "callbacks": [*own, *callbacks]}
        if isinstance(arguments.get("strategy"), ModelParallelStrategy):
            arguments["inference_mode"] = False  # layers that are put together in scoring are written to in training
        try:
            trainer = L.Trainer(**arguments)
        except (ValueError, TypeError, ImportError, MisconfigurationException) as error:
            raise ConfigError(f"trainer: {one_line(error)}") from error
        distributed.configure_ddp(trainer, self.model.cuda_graphs)
        ignore_sigterm(trainer)  # the others, which it would wait for, wait for something else: guarded stops the run
        return trainer


def check_optimizer(named: Any) -> None:
    """Raise ConfigError unless what a configuration names as optimizer is one: anything else would be called, too."""
    path = named.get("class_path") if isinstance(named, Mapping | Namespace) else None
    if path is None:
        return
    module, _, name = str(path).rpartition(".")
    found = getattr(importlib.import_module(module), name, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ConfigError(f"model.optimizer: {path} is no subclass of torch.optim.Optimizer")


def _wrong_numbers(config: Namespace) -> str:
    """Return what is wrong with a configuration's own numbers; "" for nothing."""
    if config.seed >= 2**32:
        return f"seed must lie below 2**32, got {config.seed}"
    if config.threads is not None and config.threads > _MOST_THREADS:
        return f"threads must be at most {_MOST_THREADS}, got {config.threads}"
    return ""


def _wrong_trainer(trainer: Namespace) -> str:
    """Return what is wrong with the trainer's arguments that Lightning would take; "" for nothing."""
    for name, whole in _WHOLE.items():
        if (given := trainer.get(name)) not in (None, whole):
            return (
                f"trainer.{name}={given} would score a part of the rows and call it all: a task's test_rows or "
                "train_rows say how many there are"
            )
    if trainer.get("precision") in _ROUNDED:
        return (
            f"trainer.precision={trainer.precision} would train the adapter in half precision, where small steps are "
            "rounded away: take bf16-mixed, or the backbone's own dtype"
        )
    for name in ("max_epochs", "accumulate_grad_batches"):
        given = trainer.get(name)
        if not isinstance(given, int) or given < 1:
            return f"trainer.{name} must be at least 1, got {given}"
    if (clip := trainer.get("gradient_clip_val")) is not None and not 0 <= clip < math.inf:
        return f"trainer.gradient_clip_val must be a number of at least 0, got {clip}"
    return ""


_MOST_THREADS = 1024
_ROUNDED = ("bf16-true", "16-true")
_WHOLE = {"limit_test_batches": 1.0, "fast_dev_run": False, "overfit_batches": 0.0}
"""What Lightning would take of the rows in silence; only all of them will do."""


def make_parser(parser: ArgumentParser | None = None) -> ArgumentParser:
    """Return the parser of a configuration: a new one, or ``parser`` with a configuration's keys added."""
    parser = parser or ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--name", type=str | None, default=None, help="The run's name; the file's stem if null.")
    parser.add_argument("--seed", type=NonNegativeInt, default=0, help="Decides everything random.")
    count: Any = PositiveInt  # a class made at run time, which a type checker does not follow
    parser.add_argument("--threads", type=count | None, default=None, help="CPU threads; torch's default if null.")
    parser.add_argument("--scoring", type=Scoring, default="all", help="Which tasks are scored after a stage.")
    parser.add_argument("--bounds", type=list[str], default=[], help=f"Runs beside it, of {', '.join(bounds.BOUNDS)}.")
    parser.add_class_arguments(ContinualModule, "model")
    parser.add_class_arguments(StageData, "data", skip={"task", "seed"}, instantiate=False)
    parser.add_class_arguments(L.Trainer, "trainer", instantiate=False)
    parser.add_argument(
        "--token_sample", type=NonNegativeInt, default=256, help="Tokens a task kept with their routes."
    )
    parser.add_argument("--general_ability", type=bool, default=False, help="Score untouched text after every stage.")
    parser.add_argument("--best_checkpoint", type=bool, default=False, help="Score the best epoch in training too.")
    parser.add_argument("--theory", type=bool, default=False, help="Measure the theory's bounds in training.")
    parser.add_argument("--wordings", type=Rewording | None, default=None, help="Reworded prompts to score.")
    parser.add_argument("--recorders", type=list[Recorder], default=[], help="What else is written down.")
    parser.add_argument("--stages", type=list[Stage], help="The stages, in training order.")
    parser.set_defaults({f"trainer.{name}": value for name, value in TRAINER_DEFAULTS.items()})
    return parser


@functools.cache
def _parser() -> ArgumentParser:
    """Return the one parser of this process: a sweep parses hundreds of configurations."""
    return make_parser()


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a configuration file, apply overrides and check it.

    Args:
        path: A YAML file.
        overrides: ``dotted.key=value``; a stage is named by its name, its index, or ``*`` for all.

    Raises:
        ConfigError: Anything wrong with it, in one line that names the key.
    """
    path = Path(path)
    return parse(read_text(path), path.stem, overrides, str(path))


def parse(text: str, stem: str, overrides: Sequence[str] = (), where: str = "configuration") -> Experiment:
    """Check the text of a configuration; see ``load``."""
    tree = read_tree(text, overrides, where)
    if tree.get("name") is None:
        tree["name"] = stem
    parser = _parser()
    try:
        config = parser.parse_object(copy.deepcopy(tree))  # it takes keys out of what it is given
        check_optimizer(config.model.optimizer)
        objects = parser.instantiate(config)
        resolved = parser.dump(_as_before(config), skip_none=False, skip_validation=True)  # parsed, and so validated
    except ConfigError:
        raise
    except Exception as error:  # jsonargparse wraps whatever a constructor raises in types of its own
        raise ConfigError(f"{where}: {explain(error, tree, Stage, keys_of(parser))}") from error
    if wrong := _wrong_numbers(config) or _wrong_trainer(config.trainer):
        raise ConfigError(f"{where}: {wrong}")
    bounds.check(config.bounds)
    return Experiment(
        name=f"{config.name}-{manifest.sha256(resolved)[:8]}",
        seed=objects.seed,
        threads=objects.threads,
        model=objects.model,
        data=_as_dict(objects.data),
        trainer=_as_dict(objects.trainer),
        stages=objects.stages,
        resolved=resolved,
        scoring=objects.scoring,
        token_sample=objects.token_sample,
        general_ability=objects.general_ability,
        best_checkpoint=objects.best_checkpoint,
        theory=objects.theory,
        wordings=objects.wordings,
        recorders=list(objects.recorders),
        bounds=list(objects.bounds),
    )


def _as_before(config: Namespace) -> Namespace:
    """Return a configuration without keys that came later and are not used: the names of runs are hashes of it."""
    kept = config.clone()
    if not kept.recorders:
        del kept["recorders"]
    return kept


def _as_dict(namespace: Any) -> dict[str, Any]:
    return vars(namespace).copy() if isinstance(namespace, Namespace) else dict(namespace)
