"""What rooms ask of one another by name alone, so that none imports a room above it.

AdaptedModule   what trains; ``training.module.ContinualModule`` is the one implementation
Recorder        what is written of a run; ``continual.callbacks`` holds those that ship
RowSelector     what decides which slices of a bank answer a row; ``adapters.growing.bank`` holds the one
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import lightning as L
import pyarrow as pa
from peft import PeftConfig, PeftModel
from torch import Tensor

Rows = list[dict[str, Any]]
"""Rows of a table, each a mapping of its columns."""


class AdaptedModule(L.LightningModule):
    """A frozen backbone under one adapter, trained stage after stage.

    Attributes:
        backbone: The pretrained model's description: builds it, and tokenises for it.
        adapter: The adapter's configuration.
        strategy: What keeps earlier stages from being forgotten.
        model: The adapted model; None until ``configure_model``.
        encoder: Name or folder of the sentence encoder of a backbone without words.
        start_from: A PEFT folder that the adapter started from, if any.
        instruction_encoder: That encoder, where instructions are to be encoded by one.
        row_inputs: Makes the keywords that a strategy's gate reads of rows; None where there is no gate.
        compiles: Whether training passes go through torch.compile.
        cuda_graphs: Whether passes are replayed as CUDA graphs on a GPU.
    """

    backbone: Any
    adapter: PeftConfig
    strategy: Any
    model: PeftModel | None
    encoder: str
    start_from: str | None
    instruction_encoder: Any
    row_inputs: Any
    compiles: bool
    cuda_graphs: bool

    @property
    def tuner(self) -> Any:
        """Our routed tuner, where the adapter is one; None otherwise."""
        raise NotImplementedError

    @property
    def uses_instructions(self) -> bool:
        """Whether the adapter has an instruction prior to feed."""
        raise NotImplementedError

    @property
    def takes_task_ids(self) -> bool:
        """Whether the adapter's forward pass has to be told which task its rows are of."""
        raise NotImplementedError

    @property
    def balances_experts(self) -> bool:
        """Whether the adapter has a loss of its own over all tokens of a batch, which have to be told from padding."""
        raise NotImplementedError

    @property
    def hidden_width(self) -> int:
        """Width of a language model's layers; 0 of a regressor's."""
        raise NotImplementedError

    def outputs(self, batch: dict[str, Any], parameters: dict[str, Tensor] | None = None) -> Tensor:
        """Return a batch's logits, (B, L, V), or a regressor's predictions, (B,), in float32."""
        raise NotImplementedError

    def answer_outputs(self, batch: dict[str, Any], outputs: Tensor) -> Tensor:
        """Return what stands at the answers' tokens, row after row: (B, L, ...) to (N, ...); a regressor's as it is."""
        raise NotImplementedError

    def loss(self, batch: dict[str, Any], outputs: Tensor) -> Tensor:
        """Return a training batch's loss."""
        raise NotImplementedError

    def training_pass(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return a training batch's loss, and its outputs if the strategy asks for them."""
        raise NotImplementedError

    def renew_adapter(self) -> None:
        """Put a fresh adapter, drawn from torch's generator, on the backbone as it was loaded."""
        raise NotImplementedError

    def forget_recordings(self) -> None:
        """Give up recorded training passes and their memory."""
        raise NotImplementedError

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of trainable parameters and of all."""
        raise NotImplementedError

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder, whole or not at all."""
        raise NotImplementedError

    def load_adapter(self, folder: Path) -> None:
        """Read the adapter that ``save_adapter`` wrote; raises RunError where it cannot."""
        raise NotImplementedError

    @property
    def scored(self) -> Sequence[Any]:
        """The StageData behind each of the trainer's test loaders."""
        raise NotImplementedError

    def generate(self, inputs: dict[str, Tensor], max_new_tokens: int) -> Tensor:
        """Return the tokens that follow each prompt, (B, at most ``max_new_tokens``), padded after the end mark."""
        raise NotImplementedError


class RowSelector(Protocol):
    """Decides which of a tuner's adapters answer each row of a pass.

    Attributes:
        in_use: Adapters that every row uses; None where each row's are chosen.
        observe: What is shown every layer's low-rank states, if anything.
        chosen_B: Index of the stage chosen for each row of the last pass, (B,); None where none was.
    """

    in_use: list[str] | None
    observe: Any
    chosen_B: Tensor | None

    def uses(self, rows: dict[str, Tensor | None]) -> Mapping[str, Any]:
        """Return the adapters that a pass uses, with each row's own slices where rows differ."""
        ...


@dataclass(frozen=True)
class StageContext:
    """What a recorder is told of a stage before it is trained and scored.

    Attributes:
        run: The run's name.
        seed: The run's seed.
        stage: The stage's number, from 1; 0 for the scores of the untrained model.
        name: The stage's name.
        module: The adapted model.
        stages: The data of every stage, in training order (``data.stage_data.StageData``).
        scored: Those that are scored after this stage, in the order of the test loaders; none of a skipped stage.
        recorders: All recorders of the run, in the order that Lightning calls them.
        score: Scores tasks beside the stage's own scores, and returns (rows of the table scores, of answers).
    """

    run: str
    seed: int
    stage: int
    name: str
    module: AdaptedModule
    stages: Sequence[Any]
    scored: Sequence[Any]
    recorders: Sequence[Recorder]
    score: Callable[[Sequence[Any]], tuple[Rows, Rows]]

    @property
    def keys(self) -> dict[str, Any]:
        """The columns that every row of every table begins with; the task is the stage's own by default."""
        return {"run": self.run, "seed": self.seed, "stage": self.stage, "task": self.name}

    @property
    def data(self) -> Any:
        """The data of the stage that trains; None at stage 0."""
        return self.stages[self.stage - 1] if self.stage else None

    @property
    def trained_stage(self) -> dict[str, int]:
        """After which stage each task is learnt, by the task's name."""
        return {data.name: stage for stage, data in enumerate(self.stages, start=1)}

    @property
    def is_last(self) -> bool:
        """Whether no stage follows."""
        return self.stage == len(self.stages)


class Recorder(L.Callback):
    """Something that a run writes down: Lightning's hooks, between ``begin`` and ``tables`` of each stage.

    Hooks see training (``on_train_batch_end`` ...) and then scoring: ``on_test_batch_end`` gets each batch's
    ``scoring.outcome.Outcome``, with the loader's index in the place of its task among ``context.scored``. Every
    process calls every hook; the first one writes.

    Attributes:
        schemas: Columns of tables that this project does not know; of a table without any they follow from its rows.
    """

    schemas: ClassVar[Mapping[str, pa.Schema]] = {}

    def check(self, module: AdaptedModule, stages: Sequence[Any]) -> None:
        """Get ready, once, before anything is written; raise ConfigError for what cannot be recorded."""

    def begin(self, context: StageContext) -> None:
        """Begin a stage."""

    def tables(self) -> dict[str, Rows]:
        """Return the stage's rows by table, after it was scored; each row has the columns of ``context.keys``."""
        return {}

    def needed_rows(self, data: Any) -> set[int]:
        """Return the test rows of a scored task, by index, that have to pass through the model for this recorder."""
        return set()

    def save(self, run_dir: Path) -> Sequence[Path]:
        """Write what the next stage needs of this one, in the first process, before the stage is committed.

        Returns the files and folders that ``restore`` reads: they are compared before it does.
        """
        return ()

    def restore(self, run_dir: Path, stage: int) -> None:
        """Take up what ``save`` wrote after ``stage``, the last finished one; raise RunError where it cannot."""

    def discard(self, run_dir: Path, stage: int) -> None:
        """Remove what ``save`` wrote after ``stage``, now that a later one is committed."""
