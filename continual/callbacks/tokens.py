"""While tasks are scored: a few of their tokens, with the atoms that each of them went to.

Which tokens are kept is a matter of their row and place alone: those whose hash is lowest. It is a uniform sample
without replacement that needs no random state, is the same in any batches and after every stage, and is as large as
asked for, whatever the number of rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray

from continual.adapters import QueryableLoraModel
from continual.interfaces import Recorder, Rows, StageContext
from continual.runtime import distributed
from continual.scoring.outcome import Outcome

if TYPE_CHECKING:
    from continual.data.stage_data import StageData

_NUM_BEFORE = 12  # tokens of a sampled token's context that are kept as text


class TokenRecorder(Recorder):
    """Turns the routes of some of the prompts' tokens into rows for the table ``tokens``.

    A task is sampled after the stage that trained it and after the last one, so that the table grows with the number
    of stages and not with its square: ``num_tokens`` x blocks x atoms that share a token, twice a task. Experts, which
    each projection has of its own, are no atoms: nothing is kept of them.

    Args:
        num_tokens: Tokens kept of a task; 0 for none.

    Attributes:
        wanted: The tasks that are sampled.
    """

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.rows: Rows = []
        self.wanted: list[str] = []

    def begin(self, context: StageContext) -> None:
        """Begin a stage: a task is sampled after its own and after the last."""
        self.keys, self.tasks, self.rows = context.keys, list(context.scored), []
        self._kept: dict[str, list[tuple[int, tuple[int, int, list[int], NDArray[np.float32]]]]] = {}
        own = [data.name for data in self.tasks if context.is_last or context.trained_stage[data.name] == context.stage]
        self.wanted = own if self.num_tokens else []

    def tables(self) -> dict[str, Rows]:
        """Return the rows of the table ``tokens``."""
        return {"tokens": self.rows}

    def needed_rows(self, data: StageData) -> set[int]:
        """Return the rows of a task, by their index, whose prompts hold the tokens of its sample; none without one."""
        if data.name not in self.wanted:
            return set()
        lengths = [len(row.prompt_ids) for row in data.scored_rows]  # a regression row has no tokens
        row = np.repeat(np.array([row.source["row"] for row in data.scored_rows], dtype=np.int64), lengths)
        place = np.concatenate([np.arange(length) for length in lengths])
        return set(row[_least(hashed(row, place), self.num_tokens)].tolist())

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep those of a batch's tokens that are in the sample so far."""
        outcome: Outcome = outputs
        name = self.tasks[dataloader_idx].name
        if name not in self.wanted or outcome.routes is None:
            return
        if (ids := batch["forward"].get("input_ids")) is None:  # a regression row has no tokens
            return
        if not isinstance(pl_module.tuner, QueryableLoraModel):
            return
        assert outcome.prompt_mask is not None
        mask = outcome.prompt_mask.bool().cpu().numpy()
        first = mask.argmax(axis=1)  # prompts are padded on the left
        own, column = np.nonzero(mask)
        place = column - first[own]
        order = hashed(np.asarray(outcome.rows)[own], place)
        kept = self._kept.setdefault(name, [])
        chosen = np.flatnonzero(order < kept[-1][0]) if len(kept) == self.num_tokens else np.arange(len(order))
        if not len(chosen):
            return
        chosen = chosen[_least(order[chosen], self.num_tokens)]
        routes = outcome.routes[:, torch.from_numpy(own[chosen]), torch.from_numpy(column[chosen])].float().cpu()
        ids_BP, starts = ids.cpu().numpy(), np.maximum(first[own], column - _NUM_BEFORE)
        whats = [each[chosen].tolist() for each in (order, own, place, starts, column)]
        for number, row, at, start, last, weights in zip(*whats, routes.transpose(0, 1).numpy(), strict=True):
            kept.append((number, (outcome.rows[row], at, ids_BP[row, start : last + 1].tolist(), weights)))  # (N, M)
        kept.sort(key=lambda item: item[0])
        del kept[self.num_tokens :]

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the sample of all processes' tokens into rows, by task, row and place; only now is any put into words."""
        found = distributed.of_batches(self._kept, pl_module)  # type: ignore[arg-type]
        backbone: Any = pl_module.backbone
        kept: list[dict[str, Any]] = []
        for data in self.tasks:
            items = sorted((item for own in found for item in own.get(data.name, [])), key=lambda item: item[0])
            kept += [row for _, token in items[: self.num_tokens] for row in self._rows(backbone, data.name, *token)]
        self.rows = sorted(kept, key=lambda row: (row["task"], row["row"], row["place"], row["block"], row["atom"]))

    def _rows(
        self, backbone: Any, task: str, row: int, place: int, seen: list[int], weights_NM: NDArray[np.float32]
    ) -> list[dict[str, Any]]:
        """Return a token's rows, one a block and atom that it went to; ``seen`` are its context's ids and its own."""
        text = backbone.tokenizer.decode([seen[-1]])
        if not text or "\N{REPLACEMENT CHARACTER}" in text:  # part of a letter: as its tokenizer writes it
            text = str(backbone.tokenizer.convert_ids_to_tokens(seen[-1]))
        token = {"row": row, "place": place, "token": text, "before": backbone.tokenizer.decode(seen[:-1])}
        return [
            self.keys
            | {"task": task}
            | token
            | {"block": int(block), "atom": int(atom), "value": float(weights_NM[block, atom])}
            for block, atom in np.argwhere(weights_NM > 0)
        ]


def _least(numbers: NDArray[np.uint64], count: int) -> NDArray[np.int64]:
    """Return the places of the ``count`` least numbers, or of all if there are fewer; in no order."""
    return np.arange(len(numbers)) if len(numbers) <= count else np.argpartition(numbers, count - 1)[:count]


def hashed(row: NDArray[np.int64], place: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return numbers as good as random, always the same for a row and place (splitmix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = row.astype(np.uint64) * np.uint64(1 << 32) + place.astype(np.uint64) + np.uint64(1)
        x *= np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
