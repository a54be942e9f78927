"""continual.ablate: a finished run's scores without each atom, written whole or not at all, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from analysis import load
from continual import ablate, run
from continual.callbacks import ScoreRecorder
from continual.config.experiment import parse
from continual.engine.stage_loop import StageLoop
from continual.scoring.data_module import ScoringDataModule
from continual.storage import manifest, records

ATOMS = 4  # of the tests' configuration
BANK = {
    "class_path": "continual.strategies.GrowingBank",
    "init_args": {"instruction_encoder": "backbone", "depth": 0.5, "probe_rows": 8, "reuse": "none"},
}


@pytest.fixture(scope="module")
def ablated(base_tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, trained hard enough for its atoms to matter, with its table; to read only."""
    folder = tmp_path_factory.mktemp("ablated")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(base_tree))
    run_dir = folder / "run"
    hard = ["trainer.max_epochs=8", "model.optimizer.init_args.lr=0.05"]
    assert run.main([str(folder / "tiny.yaml"), *hard, "--out", str(run_dir), "--no-report"]) == 0
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert ablate.main([str(run_dir)]) == 0
    after = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    assert after.keys() - before.keys() == {run_dir / "ablation.parquet"}
    own = run_dir / "manifest.json"  # which gets the table's digest
    then, now = (json.loads(files.pop(own)) for files in (before, after))
    assert set(now["tables"].pop("ablation")) == {"2"} and now == then
    assert {path: after[path] for path in before} == before
    return run_dir


@pytest.fixture(scope="module")
def grown(base_tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a growing bank and its table; to read only."""
    folder = tmp_path_factory.mktemp("grown")
    tree = base_tree | {"model": base_tree["model"] | {"strategy": BANK}}
    (folder / "grown.yaml").write_text(yaml.safe_dump(tree))
    assert run.main([str(folder / "grown.yaml"), "--out", str(folder / "run"), "--no-report"]) == 0
    assert ablate.main([str(folder / "run")]) == 0
    return folder / "run"


def scores_of(table: Any, atom: int) -> dict[tuple[str, str], float]:
    rows = table[(table["atom"] == atom) & (table["row"] == -1) & (table["direction"] != "none")]
    return {(str(task), str(metric)): value for task, metric, value in rows[["task", "metric", "value"]].to_numpy()}


def test_with_all_atoms_the_scores_are_the_runs_own(ablated: Path) -> None:
    table: Any = records.read(ablated, "ablation")
    scores: Any = records.read(ablated, "scores")
    own = scores[scores["stage"] == 2].set_index(["task", "metric"])["value"].to_dict()
    assert scores_of(table, -1) == pytest.approx(own)
    answers: Any = records.read(ablated, "answers")
    answers = answers[answers["stage"] == 2].set_index(["task", "row"])["value"]
    rows = table[(table["atom"] == -1) & (table["row"] >= 0)].set_index(["task", "row"])["value"]
    pd.testing.assert_series_equal(rows.sort_index(), answers.sort_index())
    assert set(table["stage"]) == {2} and set(table["atom"]) == set(range(-1, ATOMS))


def test_without_an_atom_the_scores_are_those_of_its_absence(ablated: Path, tmp_path: Path) -> None:
    state, text = manifest.read(ablated)
    made = StageLoop(parse(text, "tiny"), Path(shutil.copytree(ablated, tmp_path / "run")))
    made.prepare(state)
    made._see_labels(2)
    table: Any = records.read(ablated, "ablation")
    moved = 0
    for atom in range(ATOMS):
        recorder = ScoreRecorder()
        recorder.begin(made.context(2, made.data))
        tuner: Any = made.module.tuner
        trainer = made.experiment.make_trainer(None, tmp_path, [recorder])
        with tuner.without_atom(atom):
            trainer.test(made.module, datamodule=ScoringDataModule(made.data), verbose=False)
        expected = {(row["task"], row["metric"]): row["value"] for row in recorder.rows}
        assert scores_of(table, atom) == pytest.approx(expected)
        changed = table[(table["atom"] == atom) & (table["metric"] == "changed")]
        assert len(changed) == 2 and changed["value"].between(0, 1).all()
        moved += changed["value"].gt(0).any()
    assert moved  # the test would show nothing otherwise
    assert (table[(table["atom"] == -1) & (table["metric"] == "changed")]["value"] == 0).all()


def test_of_a_growing_bank_each_slice_has_its_atoms(grown: Path) -> None:
    frames = load(grown)
    names = list(frames.ablation["name"].cat.categories)
    assert names == ["no slice"] + [f"{name}:{atom}" for name in ("default", "stage02") for atom in range(ATOMS)]
    assert set(frames.ablation["atom"]) == {-1, *range(1, 1 + 2 * ATOMS)}
    assert list(frames.routing["name"].cat.categories) == names
    table, chosen = frames.ablation, json.loads((grown / "adapters/stage-02/bank.json").read_text())["stages"]
    home = frames.scores[(frames.scores["metric"] == "routed_home") & (frames.scores["stage"] == 2)]
    whole = table[(table["atom"] == -1) & (table["row"] >= 0)].set_index(["task", "row"])["value"]
    for task in home.loc[home["value"] == 1, "task"]:
        for atom in range(1, 1 + 2 * ATOMS):
            if names[atom].partition(":")[0] in chosen[task]:
                continue  # of a slice that none of the task's rows use, nothing is missed
            own = table[(table["atom"] == atom) & (table["row"] >= 0) & (table["task"] == task)]
            assert own.set_index(["task", "row"])["value"].equals(whole.loc[[task]])
    assert (home["value"] == 1).any()


def test_tokens_of_a_growing_bank_go_to_named_slices(grown: Path) -> None:
    tokens = load(grown).tokens
    assert set(tokens["stage"]) == {1, 2}
    total = tokens.groupby(["stage", "task", "row", "place", "block"], observed=True)["value"].sum()
    assert total.between(1 - 1e-5, 1 + 1e-5).all()
    first = set(tokens.loc[tokens["stage"] == 1, "name"])
    assert {name.partition(":")[0] for name in first} <= {"no slice", "default"}


def test_a_second_call_replaces_the_table_and_a_failed_one_does_not(
    ablated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = Path(shutil.copytree(ablated, tmp_path / "run"))
    whole = (run_dir / "ablation.parquet").read_bytes()
    assert ablate.main([str(run_dir)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run_dir)
    assert (run_dir / "ablation.parquet").read_bytes() == whole
    begin, calls = ScoreRecorder.begin, []

    def interrupted(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        begin(*arguments)

    monkeypatch.setattr(ScoreRecorder, "begin", interrupted)
    assert ablate.main([str(run_dir)]) == 130
    assert (run_dir / "ablation.parquet").read_bytes() == whole
    assert list(run_dir.rglob(".*")) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"finished_stage": 1, "complete": False}, "is not finished (stage 1 of 2 is)"),
        ({"adapter": {"class_path": "peft.LoraConfig", "init_args": {"target_modules": ["q_proj"]}}}, "LoraConfig"),
        ({"num_atoms": 1}, "has one atom"),
        (None, "holds no run"),
    ],
)
def test_what_has_no_atom_to_lose_is_refused_in_a_line(
    change: dict[str, Any] | None, words: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    if change is not None:
        shutil.copytree(finished, run_dir)
        state, text = manifest.read(run_dir)
        tree = yaml.safe_load(text)
        if "adapter" in change:
            tree["model"]["adapter"] = change["adapter"]
        elif "num_atoms" in change:
            tree["model"]["adapter"]["init_args"] |= {"num_atoms": 1, "top_k": 1}
        else:
            state = manifest.Manifest(**vars(state) | change)
        text = yaml.safe_dump(tree)
        state.config_sha256 = manifest.sha256(text)
        (run_dir / manifest.CONFIG_NAME).write_text(text)
        state.commit(run_dir)
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert ablate.main([str(run_dir)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith(f"error: {run_dir} ") and words in err
    assert sorted(tmp_path.rglob("*")) == before


def test_no_token_is_recorded_where_none_is_asked_for(
    tree: dict[str, Any], write: Callable, engine: Callable, tmp_path: Path
) -> None:
    assert engine(write(tree | {"token_sample": 0}), "--out", tmp_path / "run").code == 0
    assert not (tmp_path / "run" / "tokens.parquet").exists()
    result = engine(write(tree | {"token_sample": -1}), "--out", tmp_path / "other")
    assert result.code == 2 and "token_sample" in result.err and not (tmp_path / "other").exists()
