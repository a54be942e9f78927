"""Small batches of several label tasks that share a pass come to what each comes to by itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from continual.backbones import TinyCausalLM
from continual.data import stage_data
from continual.data.batch import Row
from continual.data.batch_order import scoring_size
from continual.data.label_tree import LabelTree
from continual.scoring import evaluate, shared_passes
from continual.scoring.shared_passes import SharedPass, concat_batches, grouped
from continual.training.module import ContinualModule

Tree = dict[str, Any]

FREE = {
    "name": "counting",
    "task": {
        "class_path": "tasks.ReasoningTask",
        "init_args": {
            "dataset": "letter_counting",
            "instruction": "Count how often the letter occurs.",
            "train_rows": 6,
            "test_rows": 4,
        },
    },
}
PROJECTIONS = {"target_modules": ["q_proj", "v_proj"]}
WAYS: dict[str, Tree] = {
    "queryable": {},
    "growing": {
        "strategy": {
            "class_path": "continual.strategies.GrowingBank",
            "init_args": {"background_rows": 8, "probe_rows": 12, "instruction_encoder": "backbone"},
        }
    },
    "experts": {
        "adapter": {
            "class_path": "continual.adapters.MoeLoraConfig",
            "init_args": {"r": 2, "num_experts": 4, "top_k": 2, **PROJECTIONS},
        }
    },
    "lora": {"adapter": {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "lora_alpha": 4, **PROJECTIONS}}},
}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tasks' batches each pass over labels held."""
    found, rank = list[int](), evaluate.log_likelihoods_of_trees

    def ranked(model: Any, forward: Any, trees: Any) -> Any:
        found.append(len(trees))
        return rank(model, forward, trees)

    for room in (evaluate, shared_passes):
        monkeypatch.setattr(room, "log_likelihoods_of_trees", ranked)
    return found


def as_on_a_gpu(patch: pytest.MonkeyPatch) -> None:
    size = scoring_size("cpu", 0)._replace(shared=True)
    patch.setattr(stage_data, "scoring_size", lambda *_: size)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_scores_tasks_together_writes_the_same(
    tree: Tree, write: Callable, engine: Callable, tmp_path: Path, passes: list[int], way: str
) -> None:
    tree["model"] |= WAYS[way]
    tree["data"] |= {"max_tokens": 1024}
    tree["stages"].insert(1, FREE)  # between the two label tasks
    config = write(tree)
    assert engine(config, "--out", tmp_path / "alone").code == 0
    assert {*passes} == {1}
    alone = len(passes)
    with pytest.MonkeyPatch.context() as patch:
        as_on_a_gpu(patch)
        assert engine(config, "--out", tmp_path / "together").code == 0
    # Of a growing bank, what is computed again after the stages may be one task's rows alone.
    assert {2} <= {*passes[alone:]} <= ({1, 2} if way == "growing" else {2})
    assert sum(passes[alone:]) == alone
    names = sorted(path.name for path in (tmp_path / "alone").glob("*.parquet"))
    assert "answers.parquet" in names and ("routing.parquet" in names) == (way != "lora")
    for name in names:
        one, other = (pd.read_parquet(tmp_path / run / name) for run in ("alone", "together"))
        pd.testing.assert_frame_equal(one, other, check_exact=False, rtol=1e-4, atol=1e-6, obj=name)


@pytest.mark.parametrize("strategy", ["PerTask", "PerInstructionLookup"])
def test_tasks_that_have_a_model_each_share_no_pass(
    tree: Tree, write: Callable, engine: Callable, tmp_path: Path, passes: list[int], strategy: str, monkeypatch: Any
) -> None:
    as_on_a_gpu(monkeypatch)
    tree["model"]["strategy"] = {"class_path": f"continual.strategies.{strategy}"}
    assert engine(write(tree), "--out", tmp_path / "run").code == 0
    assert {*passes} == {1}


def test_callbacks_find_a_batchs_tensors_before_it_is_scored(
    tree: Tree, write: Callable, engine: Callable, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu(monkeypatch)
    rows, plain = list[tuple[int, int]](), ContinualModule.on_test_batch_start

    def read(self: ContinualModule, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        rows.append((len(batch["forward"]["input_ids"]), len(batch["rows"])))
        plain(self, batch, batch_idx, dataloader_idx)

    monkeypatch.setattr(ContinualModule, "on_test_batch_start", read)
    assert engine(write(tree), "--out", tmp_path / "run").code == 0
    assert max(passes) > 1 and rows and all(tensors == own > 0 for tensors, own in rows)


def test_a_killed_run_goes_on_to_the_same_bytes(
    tree: Tree, write: Callable, engine: Callable, tmp_path: Path, contents: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_on_a_gpu(monkeypatch)
    config = write(tree)
    assert engine(config, "--out", tmp_path / "whole").code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            SharedPass, "take", fail_after(2 * 2)
        )  # batches: the untrained model's two, the first stage's two
        with pytest.raises(RuntimeError, match="the power is gone"):
            engine(config, "--out", tmp_path / "killed")
    assert engine("--resume", tmp_path / "killed").code == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def fail_after(count: int) -> Callable:
    take, taken = SharedPass.take, [0]

    def failing(self: SharedPass, *args: Any) -> Any:
        taken[0] += 1
        if taken[0] > count:
            raise RuntimeError("the power is gone")
        return take(self, *args)

    return failing


def loader(lengths: list[list[int]]) -> DataLoader:
    """Return a loader of batches of rows of so many tokens; a batch is their lengths."""
    rows = [Row({}, "", [0] * length) for batch in lengths for length in batch]
    numbers = iter(range(len(rows)))
    batches = [[next(numbers) for _ in batch] for batch in lengths]
    return DataLoader(rows, batch_sampler=batches, collate_fn=lambda rows: [row.length for row in rows])  # type: ignore[arg-type]


def groups_of(loaders: list[DataLoader]) -> list[list[Any]]:
    """Return each group's batches, (loader's index, batch), of loaders that ``grouped`` returned."""
    found: dict[int, list[Any]] = {}
    for index, each in enumerate(loaders):
        for batch in each:
            group, place = batch["shared_pass"], batch["place"]
            found.setdefault(id(group), []).append((index, group._parts[place][1]()))
    return list(found.values())


def test_batches_that_follow_each_other_share_a_pass_as_far_as_its_tokens_go() -> None:
    task: Any = None
    first, second, free = loader([[9, 8], [3]]), loader([[4, 4], [1]]), loader([[7]])
    found = grouped([(task, first, 2), (task, free, None), (task, second, 5)], max_tokens=60)
    assert found[1] is free
    # 2 x (9 + 2), 3 x (9 + 2); with the second task's two rows 5 x (9 + 5) is too much; then 3 x (4 + 5).
    assert groups_of([found[0], found[2]]) == [[(0, [9, 8]), (0, [3])], [(1, [4, 4]), (1, [1])]]
    found = grouped([(task, first, 2), (task, second, 5)], max_tokens=70)
    assert groups_of(found) == [[(0, [9, 8]), (0, [3]), (1, [4, 4])], [(1, [1])]]
    alone = grouped([(task, first, 2), (task, second, 5)], max_tokens=1)  # a batch is never cut
    assert [len(group) for group in groups_of(alone)] == [1, 1, 1, 1]


def test_a_group_is_computed_once_by_whichever_batch_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer may be told to leave batches out."""
    computed = []
    monkeypatch.setattr(shared_passes, "score_jointly", lambda module, parts: computed.append(parts) or ["a", "b"])
    module: Any = torch.nn.Linear(1, 1)
    module.device = torch.device("cpu")
    group, made = SharedPass(), list[int]()
    task: Any = "task"
    for place in (0, 1):
        batch = group.add(task, lambda place=place: made.append(place) or {"rows": [place]}, 1, (1, 1))
        assert batch["place"] == place
    assert group.batch(1, module.device) == {"rows": [1]}
    assert group.take(module, 1) == "b"
    assert group.batch(0, module.device) == {"rows": [0]}
    assert group.take(module, 0) == "a"
    assert made == [1, 0]
    assert computed == [[("task", {"rows": [0]}), ("task", {"rows": [1]})]]


def test_rows_of_several_trees_score_as_by_their_own() -> None:
    backbone = TinyCausalLM(num_layers=2)
    model = backbone.build().eval()
    labels = [["yes", "no"], ["red", "redder", "reddest of all", "blue"], ["a"]]
    trees = [LabelTree.of(backbone, names).with_beginnings(backbone, ["green"]) for names in labels]
    generator = torch.Generator().manual_seed(0)
    forwards = []
    for width, count in ((5, 3), (9, 2), (2, 1)):
        mask = torch.ones(count, width, dtype=torch.long)
        mask[0, : width // 2] = 0
        ids = torch.randint(3, 90, (count, width), generator=generator)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        forwards.append({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
    counts = [len(forward["input_ids"]) for forward in forwards]
    with torch.inference_mode():
        together = evaluate.log_likelihoods_of_trees(
            model, concat_batches(forwards), list(zip(trees, counts, strict=True))
        )
        for forward, candidates, found in zip(forwards, trees, together, strict=True):
            alone = evaluate.label_log_likelihoods(model, forward, candidates)
            torch.testing.assert_close(found, alone, rtol=0, atol=1e-5)
            assert found.shape == alone.shape and len({*found[0].tolist()}) == found.shape[1]
