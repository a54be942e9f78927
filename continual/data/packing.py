"""Packing: the rows of a training batch laid end to end into one sequence, without padding.

Packed rows are told apart by their positions, which begin again with each row. The attention masks of transformers heed
that, but not every model has such a mask: a convolution or a recurrence runs on from row to row, virtual tokens stand
before the first row alone, and an adapter may average over all tokens. No list could name them all, so that the model
at hand is asked (``check_packing``).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor

from continual.data.batch import IGNORED, PADDING, Row, widen
from continual.data.collate import Collator
from continual.errors import ConfigError, one_line
from continual.runtime.parameters import evaluating

if TYPE_CHECKING:
    from continual.interfaces import AdaptedModule


_COLUMNS, _TOKENS = 64, 256
"""``widened`` rounds the width of a tensor up to a multiple of the one; that of a tensor of tokens, of the other."""
_OF_TOKENS = ("input_ids", "position_ids", "row_of_token", "token_mask")


class PackedCollator(Collator):
    """Lays rows with their answers end to end, (1, S); the labels are those of the answers' tokens alone, (1, L).

    Args:
        multiple: The sequence's length is a multiple of it.
        arguments: ``Collator``'s.
    """

    def __init__(self, *arguments: Any, multiple: int = 1, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.multiple = multiple

    def with_answers(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the model's arguments and the labels; where positions begin again, so does what a token attends to.

        Only the columns before the answers' tokens get logits; where keywords of the adapter are by the row, a token's
        row is told too. A token of padding is a row by itself.
        """
        lengths = [row.length for row in rows]
        ids = torch.tensor([token for row in rows for token in row.prompt_ids + row.answer_ids])
        ends = zip(rows, accumulate(lengths), strict=True)
        answers = torch.tensor([column for row, end in ends for column in range(end - len(row.answer_ids), end)])
        of_tokens = {"input_ids": ids, "position_ids": torch.cat([torch.arange(length) for length in lengths])}
        if self.with_instructions or self.row_inputs is not None:
            of_tokens["row_of_token"] = torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths))
        if self.masks_padding:
            of_tokens["token_mask"] = torch.ones_like(ids)
        forward = {name: F.pad(each, (0, -len(ids) % self.multiple)).unsqueeze(0) for name, each in of_tokens.items()}
        return {"forward": forward | {"logits_to_keep": answers - 1}, "labels": ids[answers].unsqueeze(0)}


def is_packed(batch: dict[str, Any]) -> bool:
    """Say whether a training batch's rows are packed into one: only then does it name the columns that get logits."""
    return "logits_to_keep" in batch["forward"]


def widened(batch: dict[str, Any]) -> dict[str, Any]:
    """Return a packed training batch with its widths rounded up, so that an epoch has few shapes.

    Each token of padding behind the rows is a row by itself, and no label asks for it.
    """
    forward = {
        name: widen(value, PADDING[name], _TOKENS if name in _OF_TOKENS else _COLUMNS) if name in PADDING else value
        for name, value in batch["forward"].items()
    }
    return {"forward": forward, "labels": widen(batch["labels"], IGNORED, _COLUMNS)}


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
