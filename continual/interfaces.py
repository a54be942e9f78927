"""What rooms below ``continual.training`` may ask of the module that trains, so that none of them imports it.

``training.module.ContinualModule`` is the one implementation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from peft import PeftConfig, PeftModel
from torch import Tensor


class AdaptedModule(L.LightningModule):
    """A frozen backbone under one adapter, trained stage after stage.

    Attributes:
        backbone: The pretrained model's description: builds it, and tokenises for it.
        adapter: The adapter's configuration.
        strategy: What keeps earlier stages from being forgotten.
        model: The adapted model; None until ``configure_model``.
        encoder: Name or folder of the sentence encoder of a backbone without words.
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
