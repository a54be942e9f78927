"""One adapter a stage, all of them kept: the bound with known tasks, and the control that looks instructions up.

Every stage trains an adapter that starts afresh, drawn from the stage's seed, so that nothing is forgotten and nothing
is handed on. What is left to decide is which of them answers a row:

    PerTask                 the one of the row's own task, which no method may know: an upper bound
    PerInstructionLookup    argmax_i cos(e(row's instruction), e_i): no task label, no learnt router, no sharing

e(text) is the mean of the frozen backbone's input embeddings over the text's tokens (a backbone without words: a
sentence encoder's) less the fixed reference of ``adapters.instructions``: the encoding of the paper's adapter. A
method that routes by instruction has to be better, or smaller, than such a table of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from continual.adapters.instructions import InstructionEncoder
from continual.errors import RunError
from continual.runtime.parameters import adapter_tensors, load_tensors, save_tensors
from continual.strategies.base import Strategy

if TYPE_CHECKING:
    from continual.data.stage_data import StageData
    from continual.interfaces import AdaptedModule


class AdapterLibrary(Strategy):
    """Trains a fresh adapter each stage, keeps them all, and puts one in for each scoring batch.

    The adapter's folder of each stage is that stage's own adapter.

    Attributes:
        adapters: The tensors of each finished stage's adapter, on the CPU; later ones without what equals the first's.
    """

    def __init__(self) -> None:
        self.adapters: list[dict[str, Tensor]] = []
        self._chosen: int | None = None
        self._disabled = ExitStack()

    def begin_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Start a fresh adapter."""
        module.renew_adapter()

    def end_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Keep the stage's adapter."""
        # A second copy: on the CPU, .cpu() would return the parameter's own memory.
        new = {name: tensor.cpu().clone() for name, tensor in adapter_tensors(module).items()}
        if self.adapters:  # what never trains (VeRA's projections) is kept once
            new = {name: tensor for name, tensor in new.items() if not torch.equal(tensor, self.adapters[0][name])}
        self.adapters.append(new)

    def choose(self, module: AdaptedModule, data: StageData, batch: dict[str, Any]) -> int | None:
        """Return the index of the adapter that answers a batch of ``data``'s rows, None for the bare backbone."""
        raise NotImplementedError

    # -- scoring ------------------------------------------------------------------------------------------------------

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The stage's own adapter is in place."""
        self._chosen = len(self.adapters) - 1

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Put in the adapter that answers this batch."""
        if self.adapters:  # by what is kept, not by the stage: a finished run that is scored again is in none
            module: AdaptedModule = pl_module  # type: ignore[assignment]
            self.put_in(module, self.choose(module, module.scored[dataloader_idx], batch))

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the stage's own adapter back, which is what the stage's folder holds."""
        if self.adapters:
            self.put_in(pl_module, len(self.adapters) - 1)  # type: ignore[arg-type]

    def begin_untasked(self, module: AdaptedModule) -> None:
        """Let the bare backbone answer: text of no task has no adapter, nor an instruction to find one by."""
        if self.adapters:
            self.put_in(module, None)

    def put_in(self, module: AdaptedModule, index: int | None) -> None:
        """Answer by the adapter ``index`` from here on, or by the bare backbone for None."""
        assert module.model is not None
        if index == self._chosen:
            return
        with torch.inference_mode(False), torch.no_grad():
            self._disabled.close()
            if index is None:
                self._disabled.enter_context(module.model.disable_adapter())
            else:
                own = self.adapters[0] | self.adapters[index]
                for name, tensor in adapter_tensors(module).items():
                    tensor.copy_(own[name])
        self._chosen = index

    def stored_parameters(self, module: AdaptedModule) -> int:
        """Return the numbers of all adapters."""
        return sum(tensor.numel() for adapter in self.adapters for tensor in adapter.values())

    def serving_parameters(self, module: AdaptedModule) -> int:
        """Return the numbers of one adapter."""
        if not self.adapters:
            return 0
        return sum(tensor.numel() for tensor in (self.adapters[0] | self.adapters[-1]).values())

    # -- on disk ------------------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """Write all adapters."""
        save_tensors(folder, {f"{i}|{name}": t for i, each in enumerate(self.adapters) for name, t in each.items()})

    def read(self, module: AdaptedModule, folder: Path) -> None:
        """Read all adapters."""
        self.adapters = []
        for key, tensor in sorted(load_tensors(folder).items(), key=lambda item: int(item[0].partition("|")[0])):
            index, _, name = key.partition("|")
            if int(index) == len(self.adapters):
                self.adapters.append({})
            self.adapters[int(index)][name] = tensor


class PerTask(AdapterLibrary):
    """Answers each task by the adapter that its own stage trained (see the module's docstring); an oracle's bound.

    A task that is not trained yet is answered by the bare backbone.

    Stores: every stage's adapter.
    """

    def check(self, module: AdaptedModule, stages: Sequence[StageData]) -> None:
        """Note which stage trains which task."""
        self._trained = {data.name: index for index, data in enumerate(stages)}

    def choose(self, module: AdaptedModule, data: StageData, batch: dict[str, Any]) -> int | None:
        """Return the index of the task's own stage, or None where that is still to come."""
        index = self._trained[data.name]
        return index if index < len(self.adapters) else None


class PerInstructionLookup(AdapterLibrary):
    """Answers a row by the adapter whose stage's instruction is nearest (see the module's docstring).

    Of stages with equal instructions the latest answers. A row without an instruction is nearest to none of them, and
    the bare backbone answers it. All rows of a scoring batch must carry the same instruction.

    Stores: every stage's adapter, and 4 x (encoding's width) bytes a stage.

    Args:
        instruction_encoder: "backbone", the mean of its input embeddings; or a sentence encoder's name or folder.
    """

    reads_instructions = True

    def __init__(self, instruction_encoder: str = "backbone") -> None:
        super().__init__()
        self.instruction_encoder = instruction_encoder
        self.encodings: list[Tensor] = []

    def check(self, module: AdaptedModule, stages: Sequence[StageData]) -> None:
        """Make ready to encode instructions by the module's backbone."""
        self._encode = InstructionEncoder(
            module, None if self.instruction_encoder == "backbone" else self.instruction_encoder
        )

    def end_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Keep the stage's adapter and its instruction's encoding."""
        super().end_stage(module, data, stage)
        self.encodings.append(self._encode(data.task.instruction))

    def choose(self, module: AdaptedModule, data: StageData, batch: dict[str, Any]) -> int | None:
        """Return the index of the nearest stored instruction, or None where the rows carry none.

        Raises:
            RunError: The batch holds two different instructions.
        """
        if len(found := set(batch["instructions"])) != 1:
            raise RunError(
                f"task {data.name!r}: PerInstructionLookup answers one instruction a batch, got {len(found)}"
            )
        (text,) = found
        return self.nearest(self._encode(text)) if text else None

    def nearest(self, encoding: Tensor) -> int | None:
        """Return the index of the stored encoding of largest cosine with ``encoding``, (E,); the latest of equals."""
        stored = torch.stack(self.encodings)
        if not stored.any() or not encoding.any():
            return None
        cosines = F.cosine_similarity(stored, encoding.unsqueeze(0)).masked_fill(~stored.any(dim=1), -torch.inf)
        best = (cosines >= cosines.max() - 1e-6).nonzero()  # equal up to rounding
        return int(best[-1])

    def stored_parameters(self, module: AdaptedModule) -> int:
        """Return the numbers of all adapters and encodings."""
        return super().stored_parameters(module) + sum(encoding.numel() for encoding in self.encodings)

    def serving_parameters(self, module: AdaptedModule) -> int:
        """Return the numbers of one adapter and of all encodings."""
        return super().serving_parameters(module) + sum(encoding.numel() for encoding in self.encodings)

    def write(self, folder: Path) -> None:
        """Write all adapters and encodings."""
        adapters = {f"{i}|{name}": t for i, each in enumerate(self.adapters) for name, t in each.items()}
        save_tensors(folder, adapters | {f"{i}|{_ENCODING}": e for i, e in enumerate(self.encodings)})

    def read(self, module: AdaptedModule, folder: Path) -> None:
        """Read all adapters and encodings."""
        super().read(module, folder)
        self.encodings = [adapter.pop(_ENCODING) for adapter in self.adapters]


_ENCODING = "instruction encoding"  # in the place of a tensor's name, none of which has a space
