"""Adapters of their own: each stage starts afresh, and a row is answered by the adapter that should answer it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import load_file

from continual.config import experiment
from continual.engine.stage_loop import StageLoop
from continual.errors import RunError
from continual.runtime.parameters import adapter_tensors
from continual.scoring.data_module import ScoringDataModule
from continual.storage import manifest, records
from continual.strategies import Joint, PerInstructionLookup, PerTask
from continual.strategies.library import AdapterLibrary


def scores_of(run: StageLoop, stage: int) -> dict[str, float]:
    """Return the headline score of every task after a stage."""
    table = records.read(run.run_dir, "scores")
    table = table[(table["stage"] == stage) & table["metric"].isin(["accuracy", "r2"])]
    return dict(zip(table["task"], table["value"], strict=True))


@pytest.mark.parametrize("adapter", ["lora", "queryable", "regressor"])
@pytest.mark.parametrize("strategy", ["PerTask", "PerInstructionLookup"])
def test_no_task_is_forgotten(strategy: str, adapter: str, sequence: Callable[..., StageLoop]) -> None:
    run = sequence(strategy, adapter, num_stages=3, rows=6)
    run.run()
    answers = records.read(run.run_dir, "answers").set_index(["stage", "task", "row"])["prediction"]
    for number, data in enumerate(run.data, start=1):
        learnt: Any = answers.loc[number, data.name]
        assert learnt.equals(answers.loc[3, data.name])
    folders = [run.run_dir / "adapters" / f"stage-{stage:02d}" / "adapter_model.safetensors" for stage in (1, 2, 3)]
    kept = [load_file(folder) for folder in folders]
    library = run.module.strategy
    assert isinstance(library, (PerTask, PerInstructionLookup)) and len(library.adapters) == 3
    for own, tensors in zip(kept, library.adapters, strict=True):
        saved = {name.replace(".default", ""): tensor for name, tensor in (library.adapters[0] | tensors).items()}
        assert all(torch.equal(saved[name], tensor) for name, tensor in own.items())
    sizes = run.manifest.stored_parameters
    assert sizes["3"] - sizes["2"] == sizes["2"] - sizes["1"] <= sizes["1"]
    assert run.manifest.serving_parameters["3"] < sizes["3"]


def test_untrained_tasks_are_answered_by_the_bare_backbone(sequence: Callable[..., StageLoop]) -> None:
    run = sequence("PerTask", num_stages=3)
    run.run()
    answers = records.read(run.run_dir, "answers").set_index(["stage", "task", "row"])
    for stage in (1, 2):
        for data in run.data[stage:]:
            assert answers.loc[stage, data.name].equals(answers.loc[0, data.name])


@pytest.mark.parametrize("strategy", ["PerTask", "Joint"])
def test_a_stage_starts_afresh_from_its_own_seed(strategy: str, sequence: Callable[..., StageLoop]) -> None:
    run = sequence(strategy, "queryable")
    module, data = run.module, run.data[1]
    starts = []
    for touched in (False, True):
        if touched:
            with torch.no_grad():
                for tensor in adapter_tensors(module).values():
                    tensor.add_(1.0)
        L.seed_everything(data.seed, verbose=False)
        module.strategy.start(module, data, 2)
        starts.append({name: tensor.clone() for name, tensor in adapter_tensors(module).items()})
    L.seed_everything(data.seed, verbose=False)
    module.model = None
    module.configure_model()
    starts.append(adapter_tensors(module))
    assert all(torch.equal(starts[0][name], each[name]) for each in starts[1:] for name in starts[0])


def lookup(encodings: list[torch.Tensor]) -> PerInstructionLookup:
    """Return a lookup of given encodings."""
    made = PerInstructionLookup()
    made.encodings = encodings
    return made


def test_nearest_instruction_is_the_largest_cosine_and_the_latest_of_equals() -> None:
    torch.manual_seed(0)
    stored = list(torch.randn(5, 8))
    made = lookup(stored)
    for query in torch.randn(20, 8):
        brute = [float(query @ e / query.norm() / e.norm()) for e in stored]
        assert made.nearest(query) == brute.index(max(brute))
        assert made.nearest(7.0 * query) == made.nearest(query)
    assert lookup([*stored, stored[1]]).nearest(stored[1]) == 5
    assert lookup([torch.zeros(8), stored[0]]).nearest(-stored[0]) == 1  # a stage without instruction is never near
    assert lookup([torch.zeros(8)]).nearest(stored[0]) is None
    assert made.nearest(torch.zeros(8)) is None


def test_lookup_takes_the_instruction_and_not_the_task(sequence: Callable[..., StageLoop]) -> None:
    run = sequence("PerInstructionLookup", num_stages=2)
    run.run()
    strategy, module = run.module.strategy, run.module
    assert isinstance(strategy, PerInstructionLookup)
    first, second = run.data
    own = {"instructions": [first.task.instruction] * 2}
    assert strategy.choose(module, second, own) == 0  # the other task's instruction calls for the other's adapter
    assert strategy.choose(module, second, {"instructions": [""]}) is None
    with pytest.raises(RunError, match="one instruction a batch, got 2"):
        strategy.choose(module, second, {"instructions": [first.task.instruction, second.task.instruction]})
    for row in second._encoded["test"].rows:
        row.instruction = first.task.instruction
    trainer = run.experiment.make_trainer(None, run.run_dir, [*run.recorders, strategy])
    begin(run, second)
    trainer.test(module, datamodule=ScoringDataModule([second]), verbose=False)
    with_wrong = [answer["prediction"] for answer in run.scores.answers]
    strategy.put_in(module, 0)
    alone = experiment_answers(run, second)
    assert with_wrong == alone


@pytest.mark.parametrize("strategy", ["PerTask", "PerInstructionLookup"])
def test_a_finished_run_scored_again_answers_as_it_did(
    strategy: str, configure: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = yaml.safe_dump(yaml.safe_load(configure(strategy)) | {"general_ability": True})
    run = StageLoop(experiment.parse(text, "again"), tmp_path / "run")
    run.prepare()
    run.run()
    general = records.read(run.run_dir, "general")["value"]
    assert general.tolist() == [general[0]] * 3  # text of no task: the bare backbone's, whichever task came last
    state, text = manifest.read(run.run_dir)
    again = StageLoop(experiment.parse(text, "again"), run.run_dir)
    again.prepare(state)
    again._see_labels(2)
    again.scores.begin(again.context(2, again.data))
    library, chosen = again.module.strategy, set[int | None]()
    assert isinstance(library, AdapterLibrary)
    put_in = library.put_in
    monkeypatch.setattr(library, "put_in", lambda module, index: (chosen.add(index), put_in(module, index)))
    trainer = again.experiment.make_trainer(None, run.run_dir, [again.scores, library])
    trainer.test(again.module, datamodule=ScoringDataModule(again.data), verbose=False)
    assert chosen == {0, 1}
    assert [row["value"] for row in again.scores.rows] == [row["value"] for row in run.scores.rows]
    assert [row["prediction"] for row in again.scores.answers] == [row["prediction"] for row in run.scores.answers]
    folder = run.run_dir / "adapters" / "stage-02" / "adapter_model.safetensors"
    last = adapter_tensors(again.module)
    assert all(
        torch.equal(last[name.replace(".weight", ".default.weight")], t) for name, t in load_file(folder).items()
    )


def begin(run: StageLoop, data: Any) -> None:
    for recorder in run.recorders:
        recorder.begin(run.context(2, [data]))


def experiment_answers(run: StageLoop, data: Any) -> list[str]:
    """Return the answers to a task's rows as the model stands."""
    trainer = run.experiment.make_trainer(None, run.run_dir, run.recorders)
    begin(run, data)
    trainer.test(run.module, datamodule=ScoringDataModule([data]), verbose=False)
    return [answer["prediction"] for answer in run.scores.answers]


def test_joint_trains_on_every_row_so_far(sequence: Callable[..., StageLoop]) -> None:
    run = sequence("Joint", num_stages=3, rows=5)
    strategy = run.module.strategy
    assert isinstance(strategy, Joint)
    for stage, data in enumerate(run.data, start=1):
        strategy.start(run.module, data, stage)
        rows, batches = strategy.mix(data.train_rows, [])  # type: ignore[arg-type]
        assert [id(row) for row in rows] == [id(row) for each in run.data[:stage] for row in each.train_rows]
        assert sorted(index for batch in batches for index in batch) == list(range(5 * stage))


def test_joint_at_the_end_alone_is_the_last_stage_of_joint(sequence: Callable[..., StageLoop]) -> None:
    every, last = (
        sequence("Joint", num_stages=3, run="every"),
        sequence("Joint", num_stages=3, run="last", final_only=True),
    )
    every.run()
    last.run()
    assert scores_of(every, 3) == scores_of(last, 3)
    assert sorted(records.read(last.run_dir, "scores")["stage"].unique()) == [0, 3]
    assert last.manifest.complete and sorted(records.read(last.run_dir, "gradients")["stage"].unique()) == [3]


@pytest.mark.parametrize(("scoring", "expected"), [("all", (3, 3)), ("seen", (1, 2)), ("final", (1, 1))])
@pytest.mark.parametrize("adapter", ["lora", "queryable"])
def test_scoring_says_what_is_scored_between(
    scoring: str, expected: tuple[int, int], adapter: str, configure: Callable[..., str], tmp_path: Any, capsys: Any
) -> None:
    tree = yaml.safe_load(configure("Sequential", adapter, num_stages=3, rows=4)) | {"scoring": scoring}
    run = StageLoop(experiment.parse(yaml.safe_dump(tree), "scoring"), tmp_path / scoring)
    run.prepare()
    run.run()
    assert [len(scores_of(run, stage)) for stage in range(4)] == [3, *expected, 3]
    assert all(data.name in scores_of(run, stage) for stage, data in enumerate(run.data, start=1))
    assert capsys.readouterr().out.count(" - ") == 6 - sum(expected)
