"""What the growing bank is made of on disk and on the tuner: slices, folders, matrices' components, rows' clusters."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from continual.adapters.growing.bank import SlicedBank
from continual.adapters.growing.bank_folder import GATE_NAME, STATE_NAME, read_state
from continual.adapters.growing.inputs import RowInputs
from continual.compat.transformers import CACHE, cache_of

if TYPE_CHECKING:
    from continual.interfaces import AdaptedModule

FIRST = "default"
"""The slice of the first stage: the adapter that a PEFT model starts with."""


def slice_name(stage: int) -> str:
    """Return the name of the slice that a stage writes."""
    return FIRST if stage == 1 else f"stage{stage:02d}"


def bank_of(module: AdaptedModule) -> SlicedBank:
    """Return the growing bank of a module that the strategy ``GrowingBank`` has prepared."""
    return cast(SlicedBank, cast(Any, module.tuner).growing)


def add_slice(module: AdaptedModule, name: str) -> None:
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


def write_bank(module: AdaptedModule, folder: Path, notes: dict[str, Any]) -> None:
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


def read_bank(module: AdaptedModule, folder: Path) -> dict[str, Any]:
    """Read what ``write_bank`` wrote, into a module whose bank is empty; return its notes."""
    bank, state = bank_of(module), read_state(folder)
    for name in state["slices"]:
        if name not in bank.names:
            add_slice(module, name)
        bank.restore(name, load_file(folder / f"{name}.safetensors"))
    bank.gate.restore(load_file(folder / GATE_NAME), state["stages"])
    return state["notes"]


@dataclass
class Moments:
    """Sums over a stage's tokens: u = A h, a layer's low-rank state, and v = (lora_alpha / r) S u, before its B.

    Attributes:
        state_rr: Sum of u u^T.
        routed_rr: Sum of v v^T.
        mixed_rr: Sum of v u^T.
    """

    state_rr: Tensor
    routed_rr: Tensor
    mixed_rr: Tensor

    @classmethod
    def of(cls, state: Tensor, routed: Tensor) -> Moments:
        """Return those of a pass's u and v, (..., r)."""
        u, v = state.detach().float().flatten(0, -2), routed.detach().float().flatten(0, -2)
        return cls(u.T @ u, v.T @ v, v.T @ u)

    def cpu(self) -> Moments:
        """Return the same on the CPU."""
        return Moments(self.state_rr.cpu(), self.routed_rr.cpu(), self.mixed_rr.cpu())

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.state_rr + other.state_rr, self.routed_rr + other.routed_rr, self.mixed_rr + other.mixed_rr)


Components = tuple[Tensor, Tensor, Tensor]
"""left, (rows, k), how much each component moves the layer's output, (k,), most first, and right, (k, columns)."""


def components_of_B(weight_B: Tensor, moments: Moments) -> Components:
    """Return B's components, those that move the output most first.

    With C = E[v v^T] over a stage's tokens and B C^(1/2) = U Sigma W^T: left = U Sigma and right = W^T C^(-1/2), so
    that B = left right and E|| B v ||^2 = sum of Sigma^2.

    Args:
        weight_B: B, (d_out, r).
        moments: Of the layer.
    """
    root, inverse = _roots(moments.routed_rr)
    U, sigma, W = torch.linalg.svd(weight_B.detach().double().cpu() @ root, full_matrices=False)
    return U * sigma, sigma.square(), W @ inverse


def components_of_A(weight_A: Tensor, weight_B: Tensor, moments: Moments) -> Components:
    """Return A's components, those that move the output most first.

    With C = E[u u^T] and v = S u taken as linear in u, B E[v u^T] C^(-1) C^(1/2) = U Sigma W^T: left = C^(1/2) W and
    right = W^T C^(-1/2) A, so that A = left right, and the output moves by Sigma^2 a component.

    Args:
        weight_A: A, (r, d_in).
        weight_B: B, (d_out, r).
        moments: Of the layer.
    """
    root, inverse = _roots(moments.state_rr)
    output = weight_B.detach().double().cpu() @ moments.mixed_rr.double().cpu() @ inverse
    # All r directions, those that B does not read too: left right has to be A while none is dropped.
    _, sigma, W = torch.linalg.svd(output, full_matrices=output.shape[0] < output.shape[1])
    energy = torch.zeros(len(W), dtype=sigma.dtype)
    energy[: len(sigma)] = sigma.square()
    return root @ W.T, energy, W @ inverse @ weight_A.detach().double().cpu()


def _roots(moments_rr: Tensor) -> tuple[Tensor, Tensor]:
    """Return C^(1/2) and C^(-1/2), (r, r)."""
    values, vectors = torch.linalg.eigh(moments_rr.double().cpu())
    # A direction never used has no weight, and what is left of it in sums of float32 numbers is their rounding.
    root = values.clamp_min(values.max() * 1e-5 + 1e-30).sqrt()
    return vectors @ root.diag() @ vectors.T, vectors @ (1 / root).diag() @ vectors.T


def sample_text(model: Any, ids_B1: Tensor, num_tokens: int) -> Tensor:
    """Return what a language model writes after its first tokens, (B, num_tokens), drawn from torch's generator."""
    ids, cache = ids_B1, None
    for _ in range(num_tokens):
        output = model(input_ids=ids[:, -1:], **{CACHE: cache}, use_cache=True)
        cache = cache_of(output)
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
