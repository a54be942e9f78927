"""A batch's answers against each row answered alone, the plain way: one full pass a label, one full pass a token."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn

from continual.adapters import QueryableLoraConfig
from continual.adapters.tuner import is_routed
from continual.backbones import MLPRegressor, TinyCausalLM
from continual.data.batch import Row
from continual.data.collate import Collator
from continual.data.label_tree import LabelTree
from continual.data.stage_data import StageData
from continual.scoring import evaluate
from continual.scoring.evaluate import label_log_likelihoods, score_batch
from continual.scoring.outcome import Outcome
from continual.training.module import ContinualModule
from tasks import Task
from tasks.base import Split, text_rows

PROMPTS = ["Is it?", "x", "A good deal longer than all of the others, is it not?", "Is that so?"]
INSTRUCTIONS = ["Say yes or no.", "", "Answer with one of the labels.", "Say yes or no."]
LABELS = ["no", "no way", "yes", "very much so, I should think", "n"]


class MemoryTask(Task):
    """A task whose rows are given, judged as its argument says."""

    def __init__(
        self,
        rows: list[tuple[str, str]],
        kind: Literal["labels", "free"] = "free",
        labels: list[str] | None = None,
        instruction: str = "",
        judge: Callable[[str, str], float] | None = None,
    ) -> None:
        self.kind, self.labels, self.instruction, self.given, self.judge = kind, labels, instruction, rows, judge

    def _build(self) -> dict[Split, Dataset]:
        rows = text_rows([("", question, answer, index) for index, (question, answer) in enumerate(self.given)])
        return {"train": rows, "test": rows}

    def score_answer(self, row: Any, text: str) -> float:
        """Ask the judge, if there is one."""
        return self.judge(row["answer"], text) if self.judge else super().score_answer(row, text)


def adapted(kind: str, backbone: Any = None, spread: float = 0.3, **fields: Any) -> Any:
    """Return a module whose adapter changes what the backbone computes: B starts at random here."""
    config = (
        LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
        if kind == "lora"
        else QueryableLoraConfig(
            **{"r": 4, "num_atoms": 6, "top_k": 2, "num_blocks": 2, "prior_weight": 2.0, "prior_dim": 4} | fields
        )
    )
    module: Any = ContinualModule(backbone or TinyCausalLM(), config)
    module.configure_model()
    for name, parameter in module.named_parameters():
        if "lora_B" in name or "queryable_B" in name or "summary_queries" in name:
            nn.init.normal_(parameter, std=spread)
    return module.eval()


def rows_of(backbone: Any, prompts: list[str], instructions: list[str]) -> list[Row]:
    return [
        Row({"row": index}, instruction, backbone.encode_prompt("", "", prompt, 999)[0])
        for index, (prompt, instruction) in enumerate(zip(prompts, instructions, strict=True))
    ]


def plain_score(model: Any, prompt: list[int], label: list[int], instruction: list[int] | None) -> float:
    """Return log p(label | prompt) from one full pass without padding, mask, positions or cache."""
    given = {} if instruction is None else {"instruction_ids": torch.tensor([instruction or [-1]])}
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([prompt + label]), **given).logits[0].double()
    log_p = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)
    return sum(log_p[place, token].item() for place, token in enumerate(label))


def plain_scores(model: Any, backbone: Any, rows: list[Row], names: Any, instructed: bool) -> Tensor:
    """Return the scores that a batch has to come to, (B, C)."""
    return torch.tensor(
        [
            [
                plain_score(
                    model,
                    row.prompt_ids,
                    backbone.encode_answer(name),
                    backbone.encode_instruction(row.instruction) if instructed else None,
                )
                for name in names
            ]
            for row in rows
        ],
        dtype=torch.float64,
    )


def tree_scores(model: Any, backbone: Any, rows: list[Row], names: list[str], instructed: bool) -> Tensor:
    batch = Collator(backbone, instructed, answers=False)(rows)
    with torch.inference_mode():
        return label_log_likelihoods(model, batch["forward"], LabelTree.of(backbone, names))


# -- labels -----------------------------------------------------------------------------------------------------------


def test_later_labels_come_to_no_more_than_they_begin_with() -> None:
    module = adapted("queryable", TinyCausalLM())
    model: Any = module.model
    rows = rows_of(module.backbone, PROMPTS, INSTRUCTIONS)
    own, later = ["yes", "yellow", "no"], ["yell", "yet", "none", "maybe", "no"]
    forward = Collator(module.backbone, True, answers=False)(rows)["forward"]
    with torch.inference_mode():
        candidates = LabelTree.of(module.backbone, own).with_beginnings(module.backbone, later)
        found = label_log_likelihoods(model, forward, candidates)
        alone = label_log_likelihoods(model, forward, LabelTree.of(module.backbone, own))
        scores = label_log_likelihoods(model, forward, LabelTree.of(module.backbone, candidates.further))
    assert candidates.further == ("yell", "yet", "none", "maybe")
    torch.testing.assert_close(found[:, :3], alone)  # they ask for no node
    assert len(candidates.node_ids_K) == len(LabelTree.of(module.backbone, own).node_ids_K)
    most = found[:, 3:]
    assert (most > scores - 1e-5).all()
    torch.testing.assert_close(most[:, 0], scores[:, 0])  # " yell" is in the tree as far as its last letter
    assert (most[:, 1:] > scores[:, 1:] + 0.1).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["plain", "lora", "queryable"])
@pytest.mark.parametrize(
    "names", [LABELS, ["yes"], [f"label {n * n}" for n in range(40)]], ids=["five", "one", "forty"]
)
def test_one_tree_pass_equals_a_full_pass_for_each_label(kind: str, attention: Any, names: list[str]) -> None:
    backbone = TinyCausalLM(attn_implementation=attention)
    model: Any = (
        backbone.build() if kind == "plain" else adapted(kind, TinyCausalLM(attn_implementation=attention)).model
    )
    rows = rows_of(backbone, PROMPTS, INSTRUCTIONS)
    scores = tree_scores(model, backbone, rows, names, kind == "queryable")
    expected = plain_scores(model, backbone, rows, names, kind == "queryable")
    assert scores.shape == (4, len(names))
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 5, 9])
def test_log_probabilities_do_not_depend_on_the_rows_taken_at_once(rows: int) -> None:
    logits = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16)
    columns, tokens = torch.tensor([0, 2, 1, 2]), torch.tensor([6, 0, 3, 3])
    found = evaluate._log_p(logits, columns, tokens, rows)
    whole = logits.double().log_softmax(dim=-1)
    expected = torch.stack([whole[:, column, token] for column, token in zip(columns, tokens, strict=True)], dim=1)
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_instructions_change_the_scores() -> None:
    module = adapted("queryable")
    rows = rows_of(module.backbone, PROMPTS, INSTRUCTIONS)
    with_them = tree_scores(module.model, module.backbone, rows, LABELS, True)
    without = tree_scores(module.model, module.backbone, rows, LABELS, False)
    assert [bool(moved) for moved in (with_them - without).abs().amax(dim=1) > 1e-3] == [True, False, True, True]


@pytest.mark.parametrize("kind", ["lora", "queryable"])
def test_a_row_scores_the_same_alone_in_any_batch_and_among_any_labels(kind: str) -> None:
    module = adapted(kind)
    rows = rows_of(module.backbone, PROMPTS, INSTRUCTIONS)

    def score(order: list[int], names: list[str]) -> Tensor:
        return tree_scores(module.model, module.backbone, [rows[i] for i in order], names, kind == "queryable")

    together = score([0, 1, 2, 3], LABELS)
    for order in ([0], [1], [3, 1], [2, 0, 3, 1], [1, 1, 2]):
        torch.testing.assert_close(score(order, LABELS), together[order], atol=1e-5, rtol=1e-5)
    for column, name in enumerate(LABELS):
        torch.testing.assert_close(score([0, 1, 2, 3], [name])[:, 0], together[:, column], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(score([0, 1, 2, 3], LABELS[::-1]), together.flip(1), atol=1e-5, rtol=1e-5)


def test_smollm2_tree_pass_equals_full_passes(smollm2: Any) -> None:
    class Whole(TinyCausalLM):
        """SmolLM2 in float32, from the bfloat16 weights that other tests unpack too."""

        tokenizer = smollm2.tokenizer

        def build(self) -> Any:
            """Return it, cast."""
            return smollm2.build().float()

    names = ["no", "no way", "family", "very much so"]
    module = adapted("queryable", Whole(), 0.02, target_modules=["q_proj", "v_proj"])
    prompts = ["Is ice warmer than water?", "Tom has a sister, Ann. What is Ann to Tom, a friend or family?"]
    rows = rows_of(smollm2, prompts, ["Say yes or no.", "Name the relation."])
    scores = tree_scores(module.model, smollm2, rows, names, True)
    torch.testing.assert_close(scores, plain_scores(module.model, smollm2, rows, names, True), atol=1e-3, rtol=1e-5)


def label_batch(module: Any, task: Task, seen: list[str] | None = None) -> dict[str, Any]:
    data = StageData(task)
    data.prepare(module)
    data.seen_labels = seen or []
    (batch,) = data.test_dataloader()
    return batch


def test_a_row_with_fewer_choices_is_ranked_among_its_own_whatever_is_likelier() -> None:
    module = adapted("lora")
    task = MemoryTask([(prompt, "no") for prompt in PROMPTS], "labels", LABELS)
    batch = label_batch(module, task, seen=["other"])
    everything = score_batch(module, task, batch)
    unlikely = [min(LABELS.index(label), len(LABELS) - 1) for label in everything.predictions]
    for place, row in enumerate(batch["rows"]):
        row["num_choices"] = max(unlikely[place], 1)  # so many that the likeliest label is just not among them
    restricted = score_batch(module, task, batch)
    for place, row in enumerate(batch["rows"]):
        assert restricted.predictions[place] in LABELS[: row["num_choices"]]
    moved = [after != before for after, before in zip(restricted.predictions, everything.predictions, strict=True)]
    assert moved == [place > 0 for place in unlikely] and any(moved)
    for row in batch["rows"]:
        row["num_choices"] = len(LABELS)
    assert score_batch(module, task, batch) == everything


def test_label_outcome_takes_the_likeliest_label_from_one_pass() -> None:
    module = adapted("queryable")
    task = MemoryTask(list(zip(PROMPTS, ["no", "yes", "n", "no"], strict=True)), "labels", LABELS, "Say yes or no.")
    batch, passes = label_batch(module, task), []
    handle = module.model.base_model.model.register_forward_hook(lambda *_: passes.append(1))
    outcome = score_batch(module, task, batch)
    handle.remove()
    assert len(passes) == 1
    questions = [source["question"] for source in batch["rows"]]
    rows = [
        Row({}, "Say yes or no.", module.backbone.encode_prompt("Say yes or no.", "", question, 999)[0])
        for question in questions
    ]
    best = plain_scores(module.model, module.backbone, rows, LABELS, True).argmax(dim=1).tolist()
    assert outcome.predictions == [LABELS[index] for index in best]
    assert outcome.targets == [source["answer"] for source in batch["rows"]]
    assert outcome.values == [float(p == t) for p, t in zip(outcome.predictions, outcome.targets, strict=True)]
    assert sorted(outcome.rows) == [0, 1, 2, 3]
    assert outcome.seen_values is None


def test_labels_are_generated_too_only_when_asked() -> None:
    module = adapted("queryable")
    task = MemoryTask(list(zip(PROMPTS, ["no", "yes", "n", "no"], strict=True)), "labels", LABELS, "Say yes or no.")
    batch = label_batch(module, task)
    ranked, both = score_batch(module, task, batch), score_batch(module, task, batch, max_answer_tokens=4)
    assert ranked.generated_values is None
    assert both.generated_values is not None and len(both.generated_values) == len(PROMPTS)
    assert both.values == ranked.values and both.predictions == ranked.predictions
    assert both.routes is not None and ranked.routes is not None
    for one, other in zip(both.routes, ranked.routes, strict=True):  # those of the ranking pass
        torch.testing.assert_close(one, other, atol=0, rtol=0)


def outcome_of(monkeypatch: pytest.MonkeyPatch, scores: list[list[float]], seen: list[str]) -> Outcome:
    """Return the outcome of three rows whose labels score as given."""
    module = adapted("lora")
    task = MemoryTask([("q", "a"), ("q", "b"), ("q", "a")], "labels", ["a", "b"])
    monkeypatch.setattr(evaluate, "label_log_likelihoods", lambda *_: torch.tensor(scores))
    return score_batch(module, task, label_batch(module, task, seen))


def test_own_and_seen_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = outcome_of(monkeypatch, [[-1, -2, -3], [-1, -2, -0.5], [-2, -3, -1]], ["b", "c", "a"])
    assert outcome.predictions == ["a", "a", "a"]
    assert outcome.values == [1.0, 0.0, 1.0]
    assert outcome.seen_values == [1.0, 0.0, 0.0]
    assert outcome_of(monkeypatch, [[-1, -2]] * 3, ["b", "a"]).seen_values is None


def test_ties_go_to_the_first_label(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = outcome_of(monkeypatch, [[-1, -1, -1]] * 3, ["c"])
    assert outcome.predictions == ["a"] * 3
    assert outcome.seen_values == [1.0, 0.0, 1.0]


def test_a_model_that_knows_nothing_ties_exactly() -> None:
    module = adapted("queryable")
    module.model.get_input_embeddings().weight.data.zero_()  # the head is tied to it: all logits are 0
    task = MemoryTask([(prompt, "no") for prompt in PROMPTS], "labels", ["my", "no", "it"])
    assert score_batch(module, task, label_batch(module, task)).predictions == ["my"] * 4


def test_many_rows_and_labels_in_one_batch() -> None:
    module = adapted("queryable")
    names = [f"a label of some length, number {index}" for index in range(120)]  # about 4,000 tokens
    rows = rows_of(module.backbone, [f"Row {index}" for index in range(3)], [""] * 3)
    scores = tree_scores(module.model, module.backbone, rows, names, True)
    some = [0, 57, 119]
    expected = plain_scores(module.model, module.backbone, rows, [names[index] for index in some], True)
    torch.testing.assert_close(scores[:, some], expected, atol=1e-3, rtol=1e-5)


# -- generated answers ------------------------------------------------------------------------------------------------


def greedy(module: Any, prompt: list[int], instruction: list[int] | None, most: int) -> list[int]:
    """Return the likeliest next token, again and again, each from a full pass over all that stands so far."""
    ids, given = list(prompt), {} if instruction is None else {"instruction_ids": torch.tensor([instruction or [-1]])}
    while len(ids) < len(prompt) + most:
        with torch.inference_mode():
            ids.append(int(module.model(input_ids=torch.tensor([ids]), **given).logits[0, -1].argmax()))
        if ids[-1] == module.backbone.tokenizer.eos_token_id:
            break
    return ids[len(prompt) :]


def free_batch(module: Any, task: Task, most: int, **arguments: Any) -> list[Outcome]:
    data = StageData(task, **arguments)
    data.prepare(module)
    outcomes = [score_batch(module, task, batch, most) for batch in data.test_dataloader()]
    assert sum(len(outcome.rows) for outcome in outcomes) == len(task.rows("test"))
    return outcomes


def by_row(outcomes: list[Outcome]) -> list[str]:
    pairs = [pair for outcome in outcomes for pair in zip(outcome.rows, outcome.predictions, strict=True)]
    return [text for _, text in sorted(pairs)]


@pytest.fixture(params=["lora", "queryable"])
def generating(request: pytest.FixtureRequest) -> tuple[Any, MemoryTask, list[list[int]]]:
    """A module, a task, and each row's answer by hand: 7 tokens, but for rows that meet the end mark before."""
    module = adapted(request.param, TinyCausalLM(seed=3, hidden_size=64), spread=0.3)
    instruction = "Go on." if request.param == "queryable" else ""
    task = MemoryTask([(prompt, "an answer") for prompt in PROMPTS], instruction=instruction)
    given = module.backbone.encode_instruction(instruction) if request.param == "queryable" else None
    prompts = [module.backbone.encode_prompt(instruction, "", prompt, 999)[0] for prompt in PROMPTS]
    answers = [greedy(module, prompt, given, 7) for prompt in prompts]
    # The end mark becomes a token that this model does say: second or third in an answer, never in another.
    said = [token for ids in answers for token in ids[1:3] if token != ids[0]]
    end = next(token for token in said if any(token not in ids for ids in answers))
    tokenizer = module.backbone.tokenizer
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return module, task, [greedy(module, prompt, given, 7) for prompt in prompts]


def test_batched_answers_equal_greedy_ones_by_hand(generating: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, task, answers = generating
    assert min(map(len, answers)) in (2, 3)
    assert max(map(len, answers)) == 7  # one stops at the end mark, one never meets it
    seen: list[list[int]] = []
    decode = module.backbone.decode
    monkeypatch.setattr(module.backbone, "decode", lambda ids: seen.append(list(ids)) or decode(ids))
    together = free_batch(module, task, 7)
    assert len(together) == 1
    assert by_row(together) == [decode(ids) for ids in answers]
    for row, ids in zip(together[0].rows, seen, strict=True):
        assert ids[: len(answers[row])] == answers[row]
        assert set(ids[len(answers[row]) :]) <= {module.backbone.tokenizer.pad_token_id}
    alone = free_batch(module, task, 7, eval_batch_tokens=1)
    assert len(alone) == 4
    assert by_row(alone) == by_row(together)


@pytest.mark.parametrize("most", [1, 4])
def test_answers_are_never_longer_than_allowed(generating: Any, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, task, answers = generating
    lengths, passes = [], []
    decode = module.backbone.decode
    monkeypatch.setattr(module.backbone, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    module.model.base_model.model.register_forward_hook(lambda *_: passes.append(1))
    assert by_row(free_batch(module, task, most)) == [decode(ids[:most]) for ids in answers]
    assert lengths == [most] * 4
    assert len(passes) == most


def test_a_batch_stops_when_all_its_rows_have_ended(generating: Any) -> None:
    module, _, answers = generating
    short = min(range(4), key=lambda row: len(answers[row]))
    task = MemoryTask([(PROMPTS[short], "")], instruction="Go on." if module.uses_instructions else "")
    passes = []
    module.model.base_model.model.register_forward_hook(lambda *_: passes.append(1))
    free_batch(module, task, 50)
    assert len(passes) == len(answers[short]) <= 3


def test_generation_defaults_that_come_with_a_model_do_not_count(generating: Any) -> None:
    module, task, answers = generating
    config = module.model.base_model.model.generation_config
    config.repetition_penalty, config.do_sample, config.temperature, config.num_beams = 5.0, True, 9.0, 3
    assert by_row(free_batch(module, task, 7)) == [module.backbone.decode(ids) for ids in answers]


def test_the_tasks_own_scorer_judges() -> None:
    module = adapted("lora")
    task = MemoryTask([("a", "x"), ("bb", "yyy")], judge=lambda answer, text: len(answer) / 4 + len(text) / 1000)
    (outcome,) = free_batch(module, task, 5)
    assert outcome.targets == [["x", "yyy"][row] for row in outcome.rows]
    assert outcome.values == [
        len(target) / 4 + len(text) / 1000 for target, text in zip(outcome.targets, outcome.predictions, strict=True)
    ]


# -- routes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["labels", "free"])
def test_routes_are_those_of_the_prompts_own_tokens(kind: Literal["labels", "free"]) -> None:
    module = adapted("queryable")
    task = MemoryTask([(prompt, "no") for prompt in PROMPTS], kind, LABELS if kind == "labels" else None, "Go on.")
    outcome = score_batch(module, task, label_batch(module, task), 3)
    assert outcome.routes is not None
    assert outcome.prompt_mask is not None
    assert len(outcome.routes) == 2
    instruction = torch.tensor([module.backbone.encode_instruction("Go on.")])
    for place, row in enumerate(outcome.rows):
        prompt = module.backbone.encode_prompt("Go on.", "", PROMPTS[row], 999)[0]
        with torch.inference_mode(), module.tuner.record_routes() as passes:
            module.model(input_ids=torch.tensor([prompt]), instruction_ids=instruction)
        own = outcome.prompt_mask[place].bool()
        assert int(own.sum()) == len(prompt)
        for block, route in enumerate(outcome.routes):
            torch.testing.assert_close(route[place, own], passes[0]["default"][block][0], atol=1e-5, rtol=1e-4)


def test_routes_only_from_our_adapter() -> None:
    plain, routed = adapted("lora"), adapted("queryable")
    task = MemoryTask([("q", "no")], "labels", ["no", "yes"])
    assert not is_routed(plain.model)
    assert is_routed(routed.model)
    outcome = score_batch(plain, task, label_batch(plain, task))
    assert outcome.routes is None
    assert outcome.prompt_mask is None


# -- regression -------------------------------------------------------------------------------------------------------


def test_regression_outcome_is_the_squared_error() -> None:
    backbone = MLPRegressor(num_inputs=3, hidden_size=8, num_layers=2)
    config = QueryableLoraConfig(r=2, num_atoms=3, top_k=2, num_blocks=2, prior_weight=0.0, target_modules=["linear"])
    module: Any = ContinualModule(backbone, config)
    module.configure_model()
    x = torch.randn(5, 3)
    batch = {
        "forward": {"x": x},
        "labels": torch.arange(5.0),
        "rows": [{"row": 10 + index} for index in range(5)],
    }
    task: Any = SimpleNamespace(kind="regression")
    outcome = score_batch(module.eval(), task, batch)
    predicted = backbone.build()(x)  # B starts at 0
    assert [float(text) for text in outcome.predictions] == predicted.tolist()
    assert outcome.targets == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert outcome.values == pytest.approx([(p - t) ** 2 for p, t in zip(predicted.tolist(), range(5), strict=True)])
    assert outcome.rows == [10, 11, 12, 13, 14]
    assert outcome.routes is not None
    assert [route.shape for route in outcome.routes] == [(5, 1, 3), (5, 1, 3)]
