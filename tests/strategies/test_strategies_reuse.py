"""ReuseBank: the sources' bank comes over bit for bit and is not trained; A, B and queries are new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from continual.config import experiment
from continual.engine.stage_loop import StageLoop
from continual.errors import ConfigError
from continual.storage import manifest, records


def adapter(folder: Path, stage: int) -> dict:
    return load_file(folder / "adapters" / f"stage-{stage:02d}" / "adapter_model.safetensors")


def test_the_bank_is_the_sources_and_the_rest_is_new(sequence, tmp_path: Path) -> None:
    run = sequence("ReuseBank", "queryable", 3, source_stages=2)
    mixed, _ = run.module.strategy.mix([], None)
    assert mixed == []  # outside of the last source stage
    run.run()
    untrained, source, later = (adapter(tmp_path / "run", stage) for stage in (0, 2, 3))
    shared = {name for name in source if name.endswith((".atoms", ".keys", ".prior_map", ".prior_keys"))}
    assert len(shared) == 4
    for name, tensor in source.items():
        if name in shared:
            assert tensor.equal(later[name]), name
        elif not name.endswith(("instruction_reference", "summary_queries")):  # of one earlier block, nothing to learn
            assert not tensor.equal(later[name]), name
    assert not untrained[next(n for n in shared if n.endswith("atoms"))].equal(source[next(iter(sorted(shared)))])
    table: Any = records.read(tmp_path / "run", "gradients")
    steps = table.groupby("stage")["step"].max()
    assert steps.to_dict() == {2: 2 * 4, 3: 2 * 2}  # 2 epochs of 16 rows, both sources', and of 8
    scores: Any = records.read(tmp_path / "run", "scores")
    tasks = scores.query("stage == 3")["task"]
    assert set(tasks) == {"task0", "task1", "task2"}


def test_sources_answer_by_the_adapter_that_they_share(sequence, tmp_path: Path) -> None:
    run = sequence("ReuseBank", "queryable", 3, source_stages=2)
    run.run()
    table: Any = records.read(tmp_path / "run", "scores")
    scores = table.query("metric == 'accuracy'").set_index(["stage", "task"])["value"]
    assert scores[3, "task0"] == scores[2, "task0"]
    assert scores[3, "task1"] == scores[2, "task1"]
    assert scores[2, "task2"] == scores[0, "task2"]  # still to come: the bare backbone


def test_without_reuse_a_later_stage_trains_a_bank_of_its_own(sequence, tmp_path: Path) -> None:
    sequence("ReuseBank", "queryable", 3, source_stages=2, reuse=False).run()
    source, later = (adapter(tmp_path / "run", stage) for stage in (2, 3))
    assert not any(tensor.equal(later[name]) for name, tensor in source.items() if name.endswith((".atoms", ".keys")))


def test_the_control_takes_any_adapter(sequence) -> None:
    sequence("ReuseBank", "lora", 3, source_stages=2, reuse=False).run()


@pytest.mark.parametrize(
    ("adapter_name", "arguments", "message"),
    [
        ("lora", {"source_stages": 1}, "has no bank to reuse"),
        ("queryable", {"source_stages": 2}, "none is left to reuse"),
    ],
)
def test_what_cannot_be_is_refused(sequence, adapter_name: str, arguments: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sequence("ReuseBank", adapter_name, 2, **arguments)


def test_a_run_that_was_stopped_goes_on_with_the_sources_bank(sequence, tmp_path: Path) -> None:
    sequence("ReuseBank", "queryable", 3, source_stages=2).run()
    stopped = sequence("ReuseBank", "queryable", 3, source_stages=2, run="stopped")
    fit = stopped._fit

    def until_the_last(index: int) -> Any:
        if index == 3:
            raise KeyboardInterrupt
        return fit(index)

    stopped._fit = until_the_last
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    state, text = manifest.read(tmp_path / "stopped")
    again = StageLoop(experiment.parse(text, "stopped"), tmp_path / "stopped")
    again.prepare(state)
    again.run()
    whole, resumed = adapter(tmp_path / "run", 3), adapter(tmp_path / "stopped", 3)
    assert all(tensor.equal(resumed[name]) for name, tensor in whole.items())
