"""What the growing bank is made of on disk and on the tuner: slices, bank folders, B's components, rows' clusters."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from continual.adapters.bank_folder import GATE_NAME, STATE_NAME, read_state
from continual.adapters.growing import GrowingBank
from continual.batches import RowInputs

if TYPE_CHECKING:
    from continual.module import ContinualModule

FIRST = "default"
"""The slice of the first stage: the adapter that a PEFT model starts with."""


def slice_name(stage: int) -> str:
    """Return the name of the slice that a stage writes."""
    return FIRST if stage == 1 else f"stage{stage:02d}"


def bank_of(module: ContinualModule) -> GrowingBank:
    """Return the growing bank of a module that the strategy ``GrowingBank`` has prepared."""
    return cast(GrowingBank, cast(Any, module.tuner).growing)


def add_slice(module: ContinualModule, name: str) -> None:
    """Put another slice, that changes nothing yet, on the tuner."""
    model: Any = module.model
    first = model.peft_config[FIRST]
    config = type(first)(
        **{field.name: getattr(first, field.name) for field in dataclasses.fields(first) if field.init}
    )
    model.add_adapter(name, config)
    if config.uses_prior:  # fixed before the first stage and for good: a new slice starts without one
        banks = model.base_model.queryable_bank
        banks[name].instruction_reference.copy_(banks[FIRST].instruction_reference)
    model.base_model.set_adapter(bank_of(module).names)
    bank_of(module).train_only(name)


def write_bank(module: ContinualModule, folder: Path, notes: dict[str, Any]) -> None:
    """Write a bank: bank.json (which stage uses which slices), gate.safetensors and NAME.safetensors for each slice.

    bank.json also says what the gate reads and how it weighs it, for ``continual.adapters.load_bank``.
    """
    bank = bank_of(module)
    for name in bank.names:
        save_file({k: v.cpu().contiguous() for k, v in bank.tensors(name).items()}, folder / f"{name}.safetensors")
    save_file({k: v.cpu().contiguous() for k, v in bank.gate.tensors().items()}, folder / GATE_NAME)
    stages = {name: anchors.adapters for name, anchors in bank.gate.stages.items()}
    inputs = cast(RowInputs, module.row_inputs)
    reads = {"instruction_encoder": inputs.encode.name, "text_tokens": inputs.text_tokens, "depth": bank.depth}
    state = {"slices": bank.names, "stages": stages, "notes": notes, "reads": reads, "gate": bank.gate.settings}
    (folder / STATE_NAME).write_text(json.dumps(state, indent=1), encoding="utf-8")
    module.model.peft_config[FIRST].save_pretrained(str(folder))  # type: ignore[union-attr]


def read_bank(module: ContinualModule, folder: Path) -> dict[str, Any]:
    """Read what ``write_bank`` wrote, into a module whose bank is empty; return its notes."""
    bank, state = bank_of(module), read_state(folder)
    for name in state["slices"]:
        if name not in bank.names:
            add_slice(module, name)
        bank.restore(name, load_file(folder / f"{name}.safetensors"))
    bank.gate.restore(load_file(folder / GATE_NAME), state["stages"])
    return state["notes"]


def components(weight_B: Tensor, moments_rr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return B's components, those that move the output most first.

    With C = E[v v^T] over a stage's tokens, v = S u, and B C^(1/2) = U Sigma W^T: left = U Sigma and right = W^T
    C^(-1/2), so that B = left right and E|| B v ||^2 = sum of Sigma^2.

    Args:
        weight_B: B, (d_out, r).
        moments_rr: C, up to a factor, (r, r).

    Returns:
        left, (d_out, k), Sigma^2, (k,), and right, (k, r), with k = min(d_out, r).
    """
    values, vectors = torch.linalg.eigh(moments_rr.double().cpu())
    root = values.clamp_min(values.max() * 1e-10 + 1e-30).sqrt()  # a direction never used has no weight
    weight = weight_B.detach().double().cpu()
    U, sigma, W = torch.linalg.svd(weight @ vectors @ root.diag() @ vectors.T, full_matrices=False)
    return U * sigma, sigma.square(), W @ vectors @ (1 / root).diag() @ vectors.T


def write_freely(model: Any, ids_B1: Tensor, num_tokens: int) -> Tensor:
    """Return what a language model writes after its first tokens, (B, num_tokens), drawn from torch's generator."""
    ids, cache = ids_B1, None
    for _ in range(num_tokens):
        output = model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        probabilities = output.logits[:, -1].float().softmax(dim=-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1)], dim=1)
    return ids[:, 1:]


def cluster(features: Tensor, num_clusters: int, seed: int, num_rounds: int = 10) -> Tensor:
    """Return each row's cluster, (n,), by k-means from rows drawn by ``seed``."""
    points = features.double().cpu()
    start = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:num_clusters]
    centres, nearest = points[start], torch.zeros(len(points), dtype=torch.long)
    for _ in range(num_rounds):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        for index in nearest.unique():
            centres[index] = points[nearest == index].mean(dim=0)
    return nearest
