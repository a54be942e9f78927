"""Whether rows can be packed: laid into one sequence, does a model compute of each what it computes of it alone?

Packed rows are told apart by their positions, which begin again with each row (``batches.Collator``). The attention
masks of transformers heed that, but not every model has such a mask: a convolution or a recurrence runs on from row to
row, virtual tokens stand before the first row alone, and an adapter may average over all tokens. No list could name
them all, so that the model at hand is asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from continual.data.batch import Row
from continual.data.collate import Collator
from continual.errors import ConfigError, one_line
from continual.runtime.parameters import evaluating

if TYPE_CHECKING:
    from continual.interfaces import AdaptedModule


def check_packing(module: AdaptedModule, padded: Collator, packed: Collator) -> None:
    """Hold the answers to tiny rows against those to the same rows padded, and packed behind another row.

    What a row would see of the one before it shows in the second place, where only rounding that depends on shapes may;
    rounding of any kind may in the first.

    Args:
        module: The adapted model, not trained yet.
        padded: Pads rows into a batch.
        packed: Packs them.

    Raises:
        ConfigError: Answers differ by more than rounding does, or the model cannot take packed rows at all.
    """
    if module.backbone.kind != "causal_lm":
        raise ConfigError("data.packing lays tokens into one sequence, and a regressor reads none: leave it out")
    model: Any = cast(Any, module.model).get_base_model()
    rows, behind_another = ([_row(first, 9), _row(1, 3), _row(2, 3)] for first in (0, 7))
    try:
        apart, together, moved = _answers(module, padded(rows), packed(rows), packed(behind_another))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"data.packing: the model takes no packed rows ({one_line(error)}): leave it out") from error
    rounding = torch.finfo(model.dtype).eps
    num_first = len(_row(0, 9).answer_ids)
    seen = _distance(moved[num_first:], together[num_first:])
    if not (seen <= max(rounding, 1e-4) and _distance(together, apart) <= rounding**0.5):
        names = f"{type(model).__name__} with {type(module.adapter).__name__}"
        raise ConfigError(
            f"data.packing: {names} does not compute of packed rows what it computes of each alone: leave it out"
        )


def _row(index: int, length: int) -> Row:
    ids = [10 + (7 * index + 3 * place) % 50 for place in range(length)]
    return Row({"context": "", "question": ""}, f"Do task {index}.", ids[:-2], ids[-2:])


@torch.no_grad()
def _answers(module: AdaptedModule, *batches: dict[str, Any]) -> list[Tensor]:
    """Return the logits of each batch's answers, (N, V)."""
    assert module.model is not None
    # An adapter that starts at zero would hide what it makes of packed rows.
    generator = torch.Generator().manual_seed(0)
    zeros = {name: p for name, p in module.model.named_parameters() if p.requires_grad and not p.any()}
    drawn = {name: 0.1 * torch.randn(p.shape, generator=generator).to(p) for name, p in zeros.items()}
    device = next(module.model.parameters()).device
    with evaluating(module):
        moved = [move_data_to_device(batch, device) for batch in batches]
        return [module.answer_outputs(batch, module.outputs(batch, drawn)) for batch in moved]


def _distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()
