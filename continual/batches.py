"""Rows as a model takes them: tokenised once, put into batches of like length, and padded.

Training rows are padded on the right and need no attention mask; their labels cover the columns from the first answer
of the batch on, so that the head of the language model runs on those alone. Packed, they lie one after the other in a
single row without padding, and the labels are those of the answers' tokens alone. Prompts to be scored are padded on
the left, so that the last column predicts the first token of any answer.

Shapes: B rows of a batch, P prompt columns, S prompt and answer columns, L tokens of all candidate labels, K nodes of
their tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler

from continual.backbones import Backbone, CausalLM
from continual.errors import ConfigError
from continual.instructions import InstructionEncoder
from continual.wordings import TRAINING, Wording, opening
from tasks import Task
from tasks.base import Split

IGNORED = -100  # the label that cross-entropy passes over


@dataclass
class Row:
    """One encoded row: a prompt and its answer as token ids (text), or inputs and a value (regression).

    ``instruction`` is what a gate gets, which a wording may set apart from the prompt's.
    """

    source: dict[str, Any]
    instruction: str
    prompt_ids: list[int] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt_ids) + len(self.answer_ids)


class EncodedTask:
    """One split of a task, encoded for a backbone.

    Args:
        task: The task.
        backbone: Tokenises the rows.
        split: "train" or "test".
        max_tokens: Longest prompt and answer together.
        options: Whether prompts list the labels of a label task.
        wording: How rows are put into words: one wording for all, or one for each row.

    Attributes:
        rows: The encoded rows, in the task's order.
        cut_rows: Rows whose context was cut to fit ``max_tokens``.
        cut_tokens: Context tokens that were cut in all.

    Raises:
        ConfigError: The task and the backbone do not fit, or a row does not fit without cutting its question.
    """

    def __init__(
        self,
        task: Task,
        backbone: Backbone,
        split: Split,
        max_tokens: int,
        options: Literal["none", "listed"] = "none",
        wording: Wording | Sequence[Wording] = TRAINING,
    ) -> None:
        wanted = "regressor" if task.kind == "regression" else "causal_lm"
        if backbone.kind != wanted:
            raise ConfigError(f"a {task.kind} task needs a {wanted} backbone, not {type(backbone).__name__}")
        self.task = task
        self.backbone: Any = backbone  # what text needs, CausalLM alone has
        self.listed = (task.labels or []) if options == "listed" else []
        self.cut_rows = self.cut_tokens = 0
        if task.kind != "regression":
            # The same room for every row: a prompt cut to fit its own answer would tell how long that answer is.
            answers = task.labels or set(task.rows("train")["answer"][:])
            max_tokens -= max(len(self.backbone.encode_answer(text)) for text in answers)
        sources = task.rows(split)
        wordings = [wording] * len(sources) if isinstance(wording, Wording) else wording
        self.rows = [
            self._encode(cast(dict[str, Any], source), own, max_tokens)
            for source, own in zip(sources, wordings, strict=True)
        ]

    def _encode(self, source: dict[str, Any], wording: Wording, max_prompt_tokens: int) -> Row:
        at_gate = wording.at_gate(self.task.instruction)
        if self.task.kind == "regression":
            return Row(source, at_gate)
        head = opening(wording.in_prompt(self.task.instruction), wording.order(self.listed, source["row"]))
        prompt, cut = self.backbone.encode_prompt(head, source["context"], source["question"], max_prompt_tokens)
        self.cut_rows += cut > 0
        self.cut_tokens += cut
        return Row(source, at_gate, prompt, self.backbone.encode_answer(source["answer"]))


@dataclass  # not frozen: Lightning moves its tensors to the device
class Candidates:
    """The labels that a row's prompt is scored against, as a tree whose nodes one pass computes.

    A node is what one or several labels begin with, short of a whole label: a label's last token, its end mark, is only
    ever predicted.

    Attributes:
        names: Label texts; the first ``num_own`` are the task's own, the rest were seen in other stages.
        num_own: How many are the task's own.
        ids_L: Token ids of all labels, end marks included, one label after the other.
        segment_L: Which label a token belongs to.
        after_L: Index of the node that predicts a token; -1 for the prompt.
        node_ids_K: Last token id of each node; what a node continues comes before it.
        depth_K: Tokens of a node before its last.
        path_KK: Whether a node (row) is, or continues, another (column).
    """

    names: tuple[str, ...]
    num_own: int
    ids_L: Tensor
    segment_L: Tensor
    after_L: Tensor
    node_ids_K: Tensor
    depth_K: Tensor
    path_KK: Tensor

    @classmethod
    def of(cls, backbone: CausalLM, own: Sequence[str], others: Sequence[str] = ()) -> Candidates:
        """Encode the labels ``own`` and those of ``others`` that are not among them."""
        names = tuple(dict.fromkeys([*own, *others]))
        encoded = [tuple(backbone.encode_answer(name)) for name in names]
        starts = dict.fromkeys(ids[:end] for ids in encoded for end in range(1, len(ids)))
        nodes = {start: index for index, start in enumerate(starts)}
        path = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
        for start, index in nodes.items():
            path[index, [nodes[start[:end]] for end in range(1, len(start) + 1)]] = True
        return cls(
            names,
            len(own),
            torch.tensor([token for ids in encoded for token in ids]),
            torch.tensor([index for index, ids in enumerate(encoded) for _ in ids]),
            torch.tensor([nodes.get(ids[:end], -1) for ids in encoded for end in range(len(ids))]),
            torch.tensor([start[-1] for start in nodes], dtype=torch.long),
            torch.tensor([len(start) - 1 for start in nodes], dtype=torch.long),
            path,
        )


def is_packed(batch: dict[str, Any]) -> bool:
    """Say whether a training batch's rows are packed into one: only then does it name the columns that get logits."""
    return "logits_to_keep" in batch["forward"]


class RowInputs:
    """What the gate of a growing bank reads of a row, as keywords of a forward pass (``adapters.growing``).

    Args:
        backbone: Tokenises the row's own text: its context and question, without instruction and options.
        encode: Encodes an instruction, (E,).
        text_tokens: Tokens of the text that are read.
    """

    def __init__(self, backbone: Backbone, encode: InstructionEncoder, text_tokens: int) -> None:
        self.backbone: Any = backbone
        self.encode, self.text_tokens = encode, text_tokens

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return the keywords of a batch of rows."""
        instructions = [row.instruction for row in rows]
        if self.backbone.kind == "regressor":
            features = torch.tensor([row.source["x"] for row in rows])
            return {"row_features": features, "gate_instruction": self.instructions(instructions)}
        return self.of([f"{row.source['context']}\n{row.source['question']}".strip() for row in rows], instructions)

    def of(self, texts: Sequence[str], instructions: Sequence[str]) -> dict[str, Tensor]:
        """Return the keywords of rows by their own texts and their instructions; "" where there is none."""
        ids = [self.backbone.encode_text(text)[: self.text_tokens] for text in texts]
        return {"text_ids": padded(ids), "gate_instruction": self.instructions(instructions)}

    def instructions(self, texts: Sequence[str]) -> Tensor:
        """Return the encodings of instructions, (B, E)."""
        return torch.stack([self.encode(text) for text in texts])


class Collator:
    """Pads rows into a batch: a dictionary of tensors, the rows themselves under "rows".

    Args:
        backbone: Tokenises instructions; pads with its tokenizer's padding token.
        with_instructions: Whether the adapter has an instruction prior to feed.
        answers: Whether the answers follow the prompts (training) or prompts stand alone (scoring).
        candidates: Labels to score, for a task that has them.
        encoder: Encodes instructions for a backbone without words.
        row_inputs: What a gate reads of the rows, where there is one.
        share: Which of a batch's rows are this process's; all of them by default.
        task_id: What to tell an adapter that has to be told the task of its rows; None for any other.
        pack_to: 0 where rows with answers are padded; otherwise they are laid into one sequence, of a length that is a
            multiple of this.
    """

    def __init__(
        self,
        backbone: Backbone,
        with_instructions: bool,
        answers: bool,
        candidates: Candidates | None = None,
        encoder: Any = None,
        row_inputs: RowInputs | None = None,
        share: slice = slice(None),
        task_id: int | None = None,
        pack_to: int = 0,
    ) -> None:
        self.task_id, self.pack_to = task_id, pack_to
        self.backbone: Any = backbone
        self.with_instructions, self.answers = with_instructions, answers
        self.candidates, self.encoder, self.row_inputs, self.share = candidates, encoder, row_inputs, share

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Return the batch; see the module's docstring for the shapes.

        "instructions" are the rows' own, as text. "weight", of a batch with answers, is what the mean over this
        process's answer tokens (a regressor's rows) is multiplied by for the mean over processes to be that over all.
        """
        whole, own = rows, rows[self.share]
        rows = own or whole[:1]  # a process without a row computes one as the others do, for nothing
        batch = self._text(rows) if self.backbone.kind == "causal_lm" else self._numbers(rows)
        if self.answers:
            batch["weight"] = (self.share.step or 1) * self._size(own) / self._size(whole)
        batch["rows"] = [row.source for row in rows]
        batch["instructions"] = [row.instruction for row in rows]
        batch["forward"] |= self._instructions(batch["instructions"])
        if self.row_inputs is not None:
            batch["forward"] |= self.row_inputs(rows)
        if self.task_id is not None:
            batch["forward"]["task_ids"] = torch.full((len(batch["forward"]["input_ids"]),), self.task_id)
        return batch

    def _size(self, rows: Sequence[Row]) -> int:
        return sum(len(row.answer_ids) for row in rows) if self.backbone.kind == "causal_lm" else len(rows)

    def _text(self, rows: Sequence[Row]) -> dict[str, Any]:
        if not self.answers:
            return self._prompts(rows)
        return self._packed(rows) if self.pack_to else self._with_answers(rows)

    def _with_answers(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Pad on the right: a causal model never sees it, so that no attention mask is needed."""
        width, pad = max(row.length for row in rows), self.backbone.tokenizer.pad_token_id
        first = min(len(row.prompt_ids) for row in rows)  # the first column that is an answer's in any row
        ids, labels = [], []
        for row in rows:
            padding = width - row.length
            ids.append(row.prompt_ids + row.answer_ids + [pad] * padding)
            labels.append([IGNORED] * (len(row.prompt_ids) - first) + row.answer_ids + [IGNORED] * padding)
        return {"forward": {"input_ids": torch.tensor(ids)}, "labels": torch.tensor(labels)}

    def _packed(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Lay rows end to end: where positions begin again, so does what a token attends to.

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
        forward = {name: F.pad(each, (0, -len(ids) % self.pack_to)).unsqueeze(0) for name, each in of_tokens.items()}
        return {"forward": forward | {"logits_to_keep": answers - 1}, "labels": ids[answers].unsqueeze(0)}

    def _prompts(self, rows: Sequence[Row]) -> dict[str, Any]:
        """Pad on the left: the last column of every row predicts the first token of its answer."""
        width, pad = max(len(row.prompt_ids) for row in rows), self.backbone.tokenizer.pad_token_id
        lengths = [len(row.prompt_ids) for row in rows]
        mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
        batch: dict[str, Any] = {
            "forward": {
                "input_ids": torch.tensor([[pad] * (width - len(r.prompt_ids)) + r.prompt_ids for r in rows]),
                "attention_mask": mask,
                "position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0),
            }
        }
        if self.candidates is not None:
            batch["candidates"] = self.candidates
        return batch

    def _numbers(self, rows: Sequence[Row]) -> dict[str, Any]:
        return {
            "forward": {"x": torch.tensor([row.source["x"] for row in rows])},
            "labels": torch.tensor([row.source["y"] for row in rows]),
        }

    def _instructions(self, texts: Sequence[str]) -> dict[str, Tensor]:
        if not self.with_instructions:
            return {}
        if self.backbone.kind == "causal_lm":
            encoded = {text: self.backbone.encode_instruction(text) for text in set(texts)}
            return {"instruction_ids": padded([encoded[text] for text in texts])}
        return {"instruction_encoding": self.encoder.encode(list(texts))}


def padded(ids: Sequence[list[int]]) -> Tensor:
    """Return token ids of several texts, (B, L), padded with -1."""
    width = max(1, *map(len, ids))
    return torch.tensor([tokens + [-1] * (width - len(tokens)) for tokens in ids])


class LengthBatches(Sampler[list[int]]):
    """Batches of rows of like length, in an order that the seed and the epoch alone decide.

    Rows are shuffled, cut into pools of ``pool`` batches, sorted by length within a pool and batched; the batches are
    shuffled. Each pass over the sampler is the next epoch.

    Args:
        lengths: Tokens of every row.
        batch_size: Rows a batch.
        seed: Decides the order.
        pool: Batches that are sorted together; the smaller, the more random, the larger, the less padding.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, pool: int = 8) -> None:
        self.lengths, self.batch_size, self.seed, self.pool = lengths, batch_size, seed, pool
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.batch_size * self.pool
        pools = [sorted(order[i : i + size], key=lambda row: self.lengths[row]) for i in range(0, len(order), size)]
        batches = [p[i : i + self.batch_size] for p in pools for i in range(0, len(p), self.batch_size)]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


def token_batches(lengths: Sequence[int], extra: int, max_tokens: int, least: int = 1) -> list[list[int]]:
    """Return batches of row indices, longest rows first, of at most ``max_tokens`` padded tokens (at least one row).

    A batch a quarter full ends where the next row is less than two thirds as wide: few rows of very different lengths
    would else be padding for the most part.

    Args:
        lengths: Prompt tokens of every row.
        extra: Columns that scoring adds to every row (the tree of its labels, or its answer).
        max_tokens: Rows times columns of a batch.
        least: Batches there have to be, where there are as many rows.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    width = 0
    for row in order:
        full = len(batches[-1]) * width if batches else max_tokens
        narrow = 4 * full >= max_tokens and 3 * (lengths[row] + extra) < 2 * width
        shared = batches and len(batches[-1]) >= max(1, len(order) // least)
        if full + width > max_tokens or narrow or shared or not batches:
            batches.append([])
            width = lengths[row] + extra
        batches[-1].append(row)
    return batches
