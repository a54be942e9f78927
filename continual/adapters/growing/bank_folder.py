"""A growing bank outside of a run: load a bank folder onto a backbone, and give its gate what it reads of a row.

    model = load_bank(AutoModelForCausalLM.from_pretrained(...), "exported")
    inputs = GateInputs(model, tokenizer)
    model.generate(**tokenizer(prompts, return_tensors="pt"), **inputs(texts, instructions))

A bank folder is what ``continual.strategies.bank_parts.write_bank`` writes: a run's adapters/stage-NN and bank, or
what ``python -m continual.cli bank RUN export STAGE`` writes. Without the keywords, the backbone answers as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from continual.adapters.growing.bank import SlicedBank
from continual.adapters.growing.gate import StageGate
from continual.errors import ConfigError, one_line

STATE_NAME = "bank.json"
GATE_NAME = "gate.safetensors"


def read_state(folder: Path) -> dict[str, Any]:
    """Return bank.json: "slices", "stages" (each one's slices), "notes", "reads" and "gate".

    Raises:
        ConfigError: The folder holds no bank, or the file is damaged.
    """
    path = folder / STATE_NAME
    if not path.is_file():
        raise ConfigError(f"{folder} holds no growing bank: {STATE_NAME} is missing")
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged: {one_line(error)}") from error
    if lacking := [key for key in ("slices", "stages", "notes", "reads", "gate") if key not in state]:
        raise ConfigError(f"{path} lacks {', '.join(lacking)}: it was not written whole, or by an earlier version")
    return state


def load_bank(model: nn.Module, folder: str | Path) -> PeftModel:
    """Put a bank and its gate onto the backbone that it was trained on; the gate decides from here on.

    Args:
        model: The backbone, without an adapter.
        folder: A bank folder.

    Returns:
        The model, in evaluation mode, that takes ``GateInputs``' keywords in calls and in ``generate``.

    Raises:
        ConfigError: The folder holds no bank, a file is damaged, or the bank is not one of this backbone.
    """
    folder = Path(folder)
    state = read_state(folder)
    try:
        return _load(model, folder, state)
    except Exception as error:  # PEFT, safetensors and torch each have errors of their own
        raise ConfigError(f"cannot load the bank in {folder}: {one_line(error)}") from error


def _load(model: nn.Module, folder: Path, state: dict[str, Any]) -> PeftModel:
    slices: list[str] = state["slices"]
    adapted = get_peft_model(cast(PreTrainedModel, model), _config(folder), adapter_name=slices[0])
    for name in slices[1:]:
        adapted.add_adapter(name, _config(folder))
    tuner: Any = adapted.base_model
    tuner.set_adapter(slices)
    bank = tuner.growing = SlicedBank(tuner, StageGate(**state["gate"]), state["reads"]["depth"])
    for name in slices:
        bank.restore(name, load_file(folder / f"{name}.safetensors"))
    bank.gate.restore(load_file(folder / GATE_NAME), state["stages"])
    bank.reads, bank.in_use = state["reads"], None
    adapted.requires_grad_(False)
    return adapted.eval()


def _config(folder: Path) -> PeftConfig:
    """Return the configuration of a slice; each has one of its own, PEFT writes into it."""
    return PeftConfig.from_pretrained(str(folder))


class GateInputs:
    """Makes the keywords that a loaded bank takes, of rows' own texts and their instructions.

    Args:
        model: From ``load_bank``.
        tokenizer: The backbone's, as the run used it; None for a backbone that reads numbers.
    """

    def __init__(self, model: PeftModel, tokenizer: Any = None) -> None:
        # Here: batches and instructions stand above the adapters.
        from continual.adapters.growing.inputs import RowInputs
        from continual.adapters.instructions import InstructionEncoder
        from continual.backbones import CausalLM
        from continual.data.batch import padded

        self._tuner: Any = model.base_model
        self._padded = padded
        reads = self._tuner.growing.reads
        self._backbone = CausalLM(model="given")
        if tokenizer is not None:
            self._backbone.tokenizer = tokenizer
        owner: Any = SimpleNamespace(backbone=self._backbone, model=model)
        encode = InstructionEncoder(owner, reads["instruction_encoder"])
        self._inputs = RowInputs(self._backbone, encode, reads["text_tokens"])

    def __call__(self, rows: Sequence[str] | Tensor, instructions: Sequence[str]) -> dict[str, Tensor]:
        """Return the keywords of a batch.

        Args:
            rows: Each row's own text, without instruction and options; a task's context and question, a line each. For
                a backbone that reads numbers, the rows themselves, (B, F).
            instructions: Each row's instruction; "" for none.

        Returns:
            "text_ids", (B, L), or "row_features", (B, F); "gate_instruction", (B, E); and, where the slices' own routes
            depend on the instruction, "instruction_ids", (B, L). (A backbone without words then needs
            "instruction_encoding" beside them.)
        """
        if isinstance(rows, Tensor):
            keywords = {"row_features": rows, "gate_instruction": self._inputs.instructions(instructions)}
        else:
            keywords = self._inputs.of(rows, instructions)
            if any(bank.config.uses_prior for bank in self._tuner.queryable_bank.values()):
                keywords["instruction_ids"] = self._padded([self._backbone.encode_instruction(i) for i in instructions])
        device = next(self._tuner.model.parameters()).device
        return {name: value.to(device) for name, value in keywords.items()}
