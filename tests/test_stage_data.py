"""Rows become batches: what is padded where, what is cut, in which order, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import lightning as L
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig

from continual.adapters import QueryableLoraConfig
from continual.adapters.growing import inputs as inputs_module
from continual.adapters.growing.inputs import RowInputs
from continual.backbones import MLPRegressor, TinyCausalLM
from continual.data.batch import IGNORED
from continual.data.batch_order import LengthBatches, scoring_size, token_batches
from continual.data.encoding import EncodedTask
from continual.data.label_tree import LabelTree
from continual.data.prompt_variants import Wording
from continual.data.stage_data import StageData
from continual.errors import ConfigError
from continual.strategies import Sequential
from continual.training.module import ContinualModule
from tasks import Task
from tasks.base import Split, text_rows

BACKBONE = TinyCausalLM(num_layers=2)
"""A byte is a token. Only its tokenizer is used, but for one test that scores."""


class MemoryTask(Task):
    """A task whose rows are given: (context, question, answer) each, or (x, y) for a regression."""

    def __init__(
        self,
        train: list[Any],
        test: list[Any] | None = None,
        kind: Literal["labels", "free", "regression"] = "free",
        labels: list[str] | None = None,
        instruction: str = "",
    ) -> None:
        self.kind, self.labels, self.instruction = kind, labels, instruction
        self.given: dict[Split, list[Any]] = {"train": train, "test": train if test is None else test}

    def _build(self) -> dict[Split, Dataset]:
        if self.kind != "regression":
            return {
                split: text_rows([(*row, index) for index, row in enumerate(rows)])
                for split, rows in self.given.items()
            }
        return {
            split: Dataset.from_list([{"x": x, "y": y, "row": index} for index, (x, y) in enumerate(rows)])
            for split, rows in self.given.items()
        }


def stub(backbone: Any = BACKBONE, uses_instructions: bool = False) -> Any:
    """Return what StageData asks of a module."""
    return SimpleNamespace(
        backbone=backbone,
        device=torch.device("cpu"),
        uses_instructions=uses_instructions,
        hidden_width=64,
        takes_task_ids=False,
        balances_experts=False,
        instruction_encoder=None,
        row_inputs=None,
        strategy=Sequential(),
    )


def prepared(task: Task, module: Any = None, **arguments: Any) -> StageData:
    data = StageData(task, **arguments)
    data.prepare(module or stub())
    return data


def text(num_rows: int) -> list[tuple[str, str, str]]:
    """Return rows whose prompts differ in length and content."""
    return [("c" * (index * 7 % 23), f"q{index}", "a" * (index % 5 + 1)) for index in range(num_rows)]


# -- batches ----------------------------------------------------------------------------------------------------------


def test_training_batches_are_padded_right_and_labelled_on_answers_alone() -> None:
    data = prepared(MemoryTask(text(11)), batch_size=4)
    encoded = {row.source["row"]: row for row in data.train_rows}
    pad, widths = BACKBONE.tokenizer.pad_token_id, []
    for batch in data.train_dataloader():
        assert set(batch["forward"]) == {"input_ids"}
        rows = [encoded[source["row"]] for source in batch["rows"]]
        ids, labels = batch["forward"]["input_ids"], batch["labels"]
        assert ids.shape[1] == max(row.length for row in rows)
        first = min(len(row.prompt_ids) for row in rows)
        assert labels.shape[1] == ids.shape[1] - first
        widths.append(labels.shape[1] - max(len(row.answer_ids) for row in rows))
        for row, row_ids, row_labels in zip(rows, ids.tolist(), labels.tolist(), strict=True):
            assert row_ids == row.prompt_ids + row.answer_ids + [pad] * (len(row_ids) - row.length)
            whole = [IGNORED] * len(row.prompt_ids) + row.answer_ids + [IGNORED] * (len(row_ids) - row.length)
            assert row_labels == whole[first:]
            assert whole[:first] == [IGNORED] * first
    assert max(widths) > 0  # some batch mixes prompt lengths


def test_the_loss_of_a_batch_is_that_of_its_rows_alone() -> None:
    module = ContinualModule(BACKBONE, LoraConfig(target_modules=["q_proj"]))
    module.configure_model()
    module.eval()
    data = prepared(MemoryTask(text(7)), module, batch_size=7)
    (batch,) = data.train_dataloader()
    assert module.model is not None
    total, num_tokens = 0.0, 0
    for row in data.train_rows:
        logits = module.model(input_ids=torch.tensor([row.prompt_ids + row.answer_ids])).logits[0]
        log_p = logits[len(row.prompt_ids) - 1 : -1].log_softmax(dim=-1)
        total -= log_p[range(len(row.answer_ids)), row.answer_ids].sum().item()
        num_tokens += len(row.answer_ids)
    assert module.loss(batch, module.outputs(batch)).item() == pytest.approx(total / num_tokens, rel=1e-5)


def test_prompts_are_padded_left_with_positions_from_zero() -> None:
    (batch,) = prepared(MemoryTask(text(6))).test_dataloader()
    forward, pad = batch["forward"], BACKBONE.tokenizer.pad_token_id
    assert "labels" not in batch
    width = forward["input_ids"].shape[1]
    assert len({len(source["context"]) for source in batch["rows"]}) > 1
    for index, source in enumerate(batch["rows"]):
        prompt, _ = BACKBONE.encode_prompt("", source["context"], source["question"], 999)
        padding = width - len(prompt)
        assert forward["input_ids"][index].tolist() == [pad] * padding + prompt
        assert forward["attention_mask"][index].tolist() == [0] * padding + [1] * len(prompt)
        assert forward["position_ids"][index].tolist() == [0] * padding + list(range(len(prompt)))
    assert (forward["attention_mask"].sum(dim=1) == width).any()


@pytest.mark.parametrize("instruction", ["Say yes.", ""])
@pytest.mark.parametrize("loader", ["train_dataloader", "test_dataloader"])
def test_instruction_ids(instruction: str, loader: str) -> None:
    module = stub(uses_instructions=True)
    data = prepared(MemoryTask(text(3), instruction=instruction), module)
    (batch,) = getattr(data, loader)()
    ids = BACKBONE.encode_instruction(instruction) or [-1]
    assert batch["forward"]["instruction_ids"].tolist() == [ids] * 3


def test_instruction_ids_of_unlike_rows_are_padded_with_minus_one() -> None:
    data = prepared(MemoryTask(text(3)), stub(uses_instructions=True))
    rows = data.train_rows
    rows[0].instruction, rows[1].instruction, rows[2].instruction = "abc", "", "a"
    ids = data._collator(answers=True)(rows)["forward"]["instruction_ids"]
    a, b, c = BACKBONE.encode_instruction("abc")
    assert ids.tolist() == [[a, b, c], [-1, -1, -1], [a, -1, -1]]


def test_regression_batches() -> None:
    rows = [([float(index), 2.0], index / 3) for index in range(5)]
    task = MemoryTask(rows, kind="regression")
    data = prepared(task, stub(MLPRegressor(num_inputs=2)), batch_size=5, eval_batch_tokens=2)
    (batch,) = data.train_dataloader()
    order = [source["row"] for source in batch["rows"]]
    assert batch["forward"]["x"].tolist() == [[float(row), 2.0] for row in order]
    torch.testing.assert_close(batch["labels"], torch.tensor(order) / 3)
    assert [len(batch["rows"]) for batch in data.test_dataloader()] == [2, 2, 1]


def test_lightning_moves_batches_to_the_device_candidates_included() -> None:
    data = prepared(MemoryTask([("", "q", "x"), ("", "qq", "yy")], kind="labels", labels=["x", "yy"]))
    (batch,) = data.test_dataloader()
    moved = L.LightningModule().transfer_batch_to_device(batch, torch.device("meta"), 0)
    tensors = [
        *moved["forward"].values(),
        *(value for value in vars(moved["label_tree"]).values() if isinstance(value, torch.Tensor)),
    ]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved["label_tree"].names == ("x", "yy")
    assert moved["label_tree"].num_own == 2
    assert moved["rows"] == batch["rows"]
    assert batch["label_tree"].ids_L.device.type == "cpu"


# -- labels -----------------------------------------------------------------------------------------------------------


def test_candidates_are_deduplicated_and_what_they_begin_with_is_a_node_once() -> None:
    candidates = LabelTree.of(BACKBONE, ["no", "no way"], ["yes", "no", "yes"])
    assert candidates.names == ("no", "no way", "yes")
    assert candidates.num_own == 2
    encoded = [BACKBONE.encode_answer(name) for name in candidates.names]
    starts = list(dict.fromkeys(tuple(ids[:end]) for ids in encoded for end in range(1, len(ids))))
    assert len(starts) == len(" no way") + len(" yes") - len(" ")  # a byte is a token, and all begin with a space
    for index, ids in enumerate(encoded):
        own = candidates.segment_L == index
        assert candidates.ids_L[own].tolist() == ids
        before = [starts[node] if node >= 0 else () for node in candidates.after_L[own].tolist()]
        assert before == [tuple(ids[:end]) for end in range(len(ids))]
    assert len(candidates.ids_L) == sum(map(len, encoded))
    assert candidates.node_ids_K.tolist() == [start[-1] for start in starts]
    assert candidates.depth_K.tolist() == [len(start) - 1 for start in starts]
    continued = [[start[: len(other)] == other for other in starts] for start in starts]
    assert candidates.path_KK.tolist() == continued


@pytest.mark.parametrize(("score_seen_labels", "names"), [(True, ("b", "a", "c")), (False, ("b", "a"))])
def test_seen_labels_stand_behind_the_own_ones(score_seen_labels: bool, names: tuple[str, ...]) -> None:
    task = MemoryTask([("", "q", "a")], kind="labels", labels=["b", "a"])
    data = prepared(task, score_seen_labels=score_seen_labels)
    data.seen_labels = ["a", "c", "c", "b"]
    (batch,) = data.test_dataloader()
    assert batch["label_tree"].names == names
    assert batch["label_tree"].num_own == 2


# -- order ------------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 50), max_size=90), batch_size=st.integers(1, 9), pool=st.integers(1, 4))
def test_length_batches_hold_every_row_once_an_epoch(lengths: list[int], batch_size: int, pool: int) -> None:
    sampler = LengthBatches(lengths, batch_size, seed=3, pool=pool)
    for _ in range(2):
        batches = list(sampler)
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        assert len(batches) == len(sampler)
        assert sorted(map(len, batches), reverse=True)[:-1] == [batch_size] * (len(batches) - 1 if batches else 0)


def test_length_batches_follow_seed_and_epoch_alone() -> None:
    lengths = [index * 13 % 40 for index in range(100)]
    first, again, other = (LengthBatches(lengths, 8, seed) for seed in (1, 1, 2))
    epochs = [list(first), list(first)]
    torch.rand(5)  # torch's own generator has no say
    assert [list(again), list(again)] == epochs
    assert epochs[0] != epochs[1]
    assert list(other) != epochs[0]


def padding(lengths: list[int], batches: list[list[int]]) -> int:
    return sum(max(lengths[row] for row in batch) - lengths[row] for batch in batches for row in batch)


def test_length_batches_pad_less_than_random_ones_and_keep_their_order_random() -> None:
    lengths = torch.randint(10, 300, (400,)).tolist()
    together = list(LengthBatches(lengths, 8, seed=0))
    rows = torch.randperm(400).tolist()
    assert padding(lengths, together) < 0.3 * padding(lengths, [rows[i : i + 8] for i in range(0, 400, 8)])
    widths = [max(lengths[row] for row in batch) for batch in together]
    assert widths[:8] not in (sorted(widths[:8]), sorted(widths[:8], reverse=True))


def test_a_second_epoch_of_the_loader_has_another_order() -> None:
    loader = prepared(MemoryTask(text(40)), batch_size=4, seed=5).train_dataloader()
    epochs = [[[source["row"] for source in batch["rows"]] for batch in loader] for _ in range(2)]
    assert epochs[0] != epochs[1]
    assert sorted(sum(epochs[0], [])) == sorted(sum(epochs[1], [])) == list(range(40))


@given(
    lengths=st.lists(st.integers(1, 60), max_size=60),
    extra=st.integers(0, 20),
    most=st.integers(1, 300),
    full=st.sampled_from([0.25, 0.5]),
)
def test_token_batches_keep_to_their_bound(lengths: list[int], extra: int, most: int, full: float) -> None:
    batches = token_batches(lengths, extra, most, full)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    sizes = [len(batch) * (max(lengths[row] for row in batch) + extra) for batch in batches]
    assert all(size <= most or len(batch) == 1 for size, batch in zip(sizes, batches, strict=True))
    flat = [lengths[row] for batch in batches for row in batch]
    assert flat == sorted(flat, reverse=True)
    for before, after in zip(batches, batches[1:], strict=False):  # no batch ends before it has to, or should
        width, next_width = (lengths[batch[0]] + extra for batch in (before, after))
        narrow = next_width / width < 2 / 3 and len(before) * width >= most * full
        assert (len(before) + 1) * width > most or narrow
    for batch, size in zip(batches, sizes, strict=True):  # a batch that is full enough is not padding for the most part
        width = lengths[batch[0]] + extra
        assert all(lengths[row] + extra >= width * 2 / 3 for row in batch[math.ceil(most * full / width) :]), size


def test_rows_of_two_lengths_share_no_large_batch() -> None:
    assert token_batches([5] * 4 + [30] * 4, 0, 400) == [[4, 5, 6, 7], [0, 1, 2, 3]]
    assert len(token_batches([5] * 4 + [30] * 4, 0, 4000)) == 1  # so few rows that another pass would cost more


@pytest.mark.parametrize(
    "device, width, sizes, uneven",
    [("cpu", 64, [8192, 1808], 2), ("cuda", 64, [10_000], 1), ("cuda", 4096, [8192, 1808], 1)],
)
def test_scoring_batches_are_as_large_as_the_device_likes_them(
    device: str, width: int, sizes: list[int], uneven: int
) -> None:
    module = stub()
    module.hidden_width = width
    data = prepared(MemoryTask([("", "why?", "x")]), module)
    module.device = torch.device(device)
    assert [len(batch) for batch in data.scoring_batches([1] * 10_000)] == sizes
    data.eval_batch_tokens = 1600
    assert [len(batch) for batch in data.scoring_batches([1] * 2000)] == [1600, 400]
    # 600 tokens of wide rows are more than a quarter of a batch, and less than half of one.
    assert len(data.scoring_batches([4] * 150 + [1] * 50)) == uneven


@pytest.mark.parametrize("width, tokens", [(0, 65_536), (576, 65_536), (896, 30_000), (2048, 8192), (8192, 8192)])
def test_wider_backbones_are_scored_in_smaller_batches_on_a_gpu(width: int, tokens: int) -> None:
    assert scoring_size("cuda", width).tokens == tokens
    assert scoring_size("cpu", width) == scoring_size("cpu", 0)


def test_scoring_batches_count_the_labels_columns() -> None:
    rows = [("", "q" * 10, "x")] * 12  # 18 tokens a prompt, with "\nAnswer:"
    labels = MemoryTask(rows, kind="labels", labels=["x", "yy"])  # " ", " x", " y" and " yy"
    free = MemoryTask(rows)  # 3 tokens an answer
    for task, columns in ((labels, 18 + 4), (free, 18 + 3)):
        data = prepared(task, eval_batch_tokens=4 * columns)
        assert [len(batch["rows"]) for batch in data.test_dataloader()] == [4, 4, 4]
        data.eval_batch_tokens = 4 * columns - 1
        assert len(next(iter(data.test_dataloader()))["rows"]) == 3


# -- cutting and refusing ---------------------------------------------------------------------------------------------


def test_long_contexts_are_cut_and_counted_and_questions_never() -> None:
    rows = [("c" * 30, "why?", "yes"), ("c" * 4, "why?", "yes"), ("c" * 33, "why?", "no")]
    task = MemoryTask(rows)
    encoded = EncodedTask(task, BACKBONE, "train", max_tokens=40)
    # 40 - 5 (" yes" and its end) - 5 ("\nwhy?") - 8 ("\nAnswer:") leaves 22 for the context.
    assert (encoded.cut_rows, encoded.cut_tokens) == (2, 8 + 11)
    for row in encoded.rows:
        assert row.length <= 40
        prompt = BACKBONE.tokenizer.decode(row.prompt_ids)
        assert prompt == f"{row.source['context'][:22]}\nwhy?\nAnswer:"
    with pytest.raises(ConfigError, match="neither is ever cut") as raised:
        EncodedTask(task, BACKBONE, "train", max_tokens=17)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("labels", [["y", "a long label"], None])
def test_a_cut_prompt_does_not_tell_how_long_its_answer_is(labels: list[str] | None) -> None:
    rows = [("c" * 60, "why?", answer) for answer in ("y", "a long label", "y")]
    task = MemoryTask(rows, rows[:2], kind="labels" if labels else "free", labels=labels)
    for split in ("train", "test"):
        encoded = EncodedTask(task, BACKBONE, split, max_tokens=50)
        assert len({len(row.prompt_ids) for row in encoded.rows}) == 1
        assert max(row.length for row in encoded.rows) == 50


@pytest.mark.parametrize(
    ("task", "backbone", "message"),
    [
        (MemoryTask(text(2)), MLPRegressor(), "a free task needs a causal_lm backbone, not MLPRegressor"),
        (
            MemoryTask([([1.0], 2.0)], kind="regression"),
            BACKBONE,
            "a regression task needs a regressor backbone, not TinyCausalLM",
        ),
    ],
)
def test_a_backbone_of_the_wrong_kind_is_refused(task: Task, backbone: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepared(task, stub(backbone))


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 0), ("max_tokens", 1), ("eval_batch_tokens", 0), ("validation_rows", -1), ("num_workers", -1)],
)
def test_bad_values_are_refused_in_one_line(name: str, value: int) -> None:
    arguments: dict[str, Any] = {name: value}
    with pytest.raises(ValueError, match=rf"^data\.{name} must be at least {value + 1}, got {value}$"):
        StageData(MemoryTask(text(2)), **arguments)


# -- the stage's data -------------------------------------------------------------------------------------------------


def sources(batches: Any) -> list[int]:
    return [source["row"] for batch in batches for source in batch["rows"]]


def test_validation_rows_are_held_out_of_training() -> None:
    data = prepared(MemoryTask(text(10), text(3)), batch_size=4, validation_rows=3)
    held = {row.source["row"] for row in data.held_out_rows}
    assert len(held) == 3 and set(sources(data.train_dataloader())) == set(range(10)) - held
    (validation,) = data.val_dataloader()
    assert set(sources(validation)) == held
    assert all("attention_mask" in batch["forward"] for batch in validation)
    assert data.num_batches == 2 == len(data.train_dataloader())
    assert prepared(MemoryTask(text(10))).val_dataloader() == []


def test_validation_rows_may_not_take_every_row() -> None:
    prepared(MemoryTask(text(4)), validation_rows=3)
    with pytest.raises(ConfigError, match=r"data.validation_rows \(4\) leaves none of the 4 training rows"):
        prepared(MemoryTask(text(4)), validation_rows=4)


def test_held_out_rows_can_be_scored_in_the_place_of_test_rows() -> None:
    data = prepared(MemoryTask(text(10), text(4)), validation_rows=3, score_rows="held_out")
    scored, trained = sources(data.test_dataloader()), sources(data.train_dataloader())
    assert len(scored) == 3 and sorted([*scored, *trained]) == list(range(10))
    assert list(data._encoded) == ["train"]  # nothing of the test rows is at hand
    assert (data.facts()["test_rows"], data.facts()["trained_rows"]) == (3, 7)
    tested = prepared(MemoryTask(text(10), text(4)), validation_rows=3)
    assert sorted(sources(tested.test_dataloader())) == [0, 1, 2, 3]


def test_held_out_rows_are_reworded_too() -> None:
    data = prepared(MemoryTask(text(10), text(4)), validation_rows=3, score_rows="held_out")
    other = data.worded(Wording("other", "Say something else entirely."))
    assert sorted(sources(other.test_dataloader())) == sorted(sources(data.test_dataloader()))
    assert list(other._encoded) == ["train"]
    before, after = ([row.prompt_ids for row in each.held_out_rows] for each in (data, other))
    assert all(own != new for own, new in zip(before, after, strict=True))


def test_held_out_rows_are_not_scored_where_none_are_held_out() -> None:
    with pytest.raises(ConfigError, match="data.score_rows is held_out and data.validation_rows holds out no row"):
        StageData(MemoryTask(text(4)), score_rows="held_out")


def test_facts() -> None:
    task = MemoryTask([("c" * 30, "q", "a"), ("", "q", "a"), ("", "q", "a")], [("c" * 9, "q", "a")])
    data = prepared(task, max_tokens=30, validation_rows=1)
    assert data.facts() == {**task.description(), "cut_rows": {"train": 1, "test": 0}, "trained_rows": 2}
    assert data.facts()["train_rows"] == 3


def test_the_longest_training_answer_bounds_generation() -> None:
    data = prepared(MemoryTask([("", "q", "abc"), ("", "q", "a")], [("", "q", "abcdefgh")]))
    assert data.max_answer_tokens == len(BACKBONE.encode_answer("abc"))


def test_rows_are_encoded_once() -> None:
    data = prepared(MemoryTask(text(3)))
    rows = data.train_rows
    data.prepare(stub())
    assert data.train_rows[0] is rows[0]


@pytest.fixture
def quiet_trainer() -> Callable[..., L.Trainer]:
    """Return a maker of Trainers that write nothing."""

    def make(**arguments: Any) -> L.Trainer:
        off: dict[str, Any] = dict.fromkeys(
            ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
        )
        return L.Trainer(accelerator="cpu", devices=1, **off, **arguments)

    return make


def test_a_trainer_alone_sets_the_data_up(quiet_trainer: Callable[..., L.Trainer]) -> None:
    module = ContinualModule(BACKBONE, QueryableLoraConfig(r=2, num_atoms=3, top_k=2, num_blocks=2))
    data = StageData(MemoryTask(text(9), instruction="Say."), batch_size=4, validation_rows=2, num_workers=1)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 4
    assert 0 <= trainer.callback_metrics["score"] <= 1


def test_a_text_that_a_gate_reads_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for one call's, no more than so many are kept."""
    monkeypatch.setattr(inputs_module, "_MOST_KEPT", 3)
    backbone, asked = TinyCausalLM(num_layers=2), list[str]()
    encode = backbone.encode_text
    monkeypatch.setattr(backbone, "encode_text", lambda text: asked.append(text) or encode(text))
    inputs = RowInputs(backbone, lambda _: torch.zeros(4), text_tokens=2)  # type: ignore[arg-type]
    for texts in (["abc", "de"], ["de", "abc", "de"], ["f"]):
        expected = [(encode(text)[:2] + [-1])[:2] for text in texts]
        assert inputs.of(texts, texts)["text_ids"].tolist() == (expected if texts != ["f"] else [[*encode("f")]])
    assert sorted(asked) == ["abc", "de", "f"]
    inputs.of(["gh", "f"], ["", ""])
    assert set(inputs._ids) == {"gh", "f"}
