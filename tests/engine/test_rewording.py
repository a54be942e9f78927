"""A finished model under reworded prompts: tables, what is refused before training, a run scored again later."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import analysis.report
from analysis.runs.frames import Frame
from continual import rescore, run
from continual.callbacks import ScoreRecorder
from continual.config import experiment
from continual.data.stage_data import StageData
from continual.engine.stage_loop import StageLoop
from continual.scoring.data_module import ScoringDataModule
from continual.storage import manifest, records

OWN = {"animals": "Sort the animals.", "colours": "Sort the colours."}
OTHERS = {"animals": ["Which kind of beast?", "Bird or fish, please."], "colours": ["Warm or cold, is it?"]}
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}}
SAME = ["task", "row", "value"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "others.json"
    path.write_text(json.dumps(OTHERS))
    return path


@pytest.fixture(scope="module")
def worded(base_tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with listed options, scored in every rewording."""
    folder = tmp_path_factory.mktemp("worded")
    (folder / "others.json").write_text(json.dumps(OTHERS))
    words = {"file": str(folder / "others.json"), "where": ["prompt", "gate", "both"]}
    (folder / "words.yaml").write_text(
        yaml.safe_dump(base_tree | {"data": {"batch_size": 4, "options": "listed"}, "wordings": words})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis.report, "write_report", lambda run_dir: run_dir / "report.html")
        assert run.main([str(folder / "words.yaml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def read(run_dir: Path, table: str) -> Frame:
    return records.read(run_dir, table)


def taken_up(run_dir: Path) -> StageLoop:
    state, text = manifest.read(run_dir)
    sequence = StageLoop(experiment.parse(text, "again"), run_dir)
    sequence.prepare(state)
    return sequence


def test_every_wording_is_scored_once_on_every_task_that_it_suits(worded: Path) -> None:
    rows = read(worded, "wordings")
    rows = rows[rows["metric"] == "accuracy"]
    kinds = rows.groupby("task")[["wording", "where", "options"]].apply(lambda group: set(map(tuple, group.to_numpy())))
    for task, texts in OTHERS.items():
        wanted = {
            (f"others-{i + 1}", where, options)
            for i in range(len(texts))
            for where in ("prompt", "gate", "both")
            for options in ("kept", "dropped", "shuffled")
        }
        assert kinds[task] == wanted | {("none", "both", "kept"), ("wrong", "both", "kept")}
    assert not rows.duplicated(["task", "wording", "where", "options"]).any()
    assert set(rows["stage"]) == {2}


def test_scores_are_the_means_of_their_answers(worded: Path) -> None:
    keys = ["task", "wording", "where", "options"]
    scores = read(worded, "wordings")
    scores = scores[scores["metric"] == "accuracy"].set_index(keys)["value"].sort_index()
    means = read(worded, "wording_answers").groupby(keys)["value"].mean().sort_index()
    assert scores.to_dict() == pytest.approx(means.to_dict())


def test_a_wording_scores_as_a_task_built_with_that_instruction_does(worded: Path) -> None:
    sequence = taken_up(worded)
    built = []
    for data in sequence.data:
        task = copy.copy(data.task)
        task.instruction = OTHERS[data.name][0]
        other = StageData(task, **sequence.experiment.data)
        other.prepare(sequence.module)
        other.name = data.name
        built.append(other)
    recorder = ScoreRecorder()
    recorder.begin(sequence.context(2, built))
    trainer = sequence.experiment.make_trainer(None, worded, [recorder])
    trainer.test(sequence.module, datamodule=ScoringDataModule(built), verbose=False)
    rows = read(worded, "wording_answers")
    rows = rows[(rows["wording"] == "others-1") & (rows["where"] == "both") & (rows["options"] == "kept")]
    assert rows[SAME].to_dict("records") == [{name: row[name] for name in SAME} for row in recorder.answers]


def test_a_run_killed_before_its_last_commit_ends_with_the_same_tables(
    worded: Path, engine: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = manifest.Manifest.commit

    def fail(self: manifest.Manifest, run_dir: Path) -> None:
        if self.complete:
            raise KeyboardInterrupt
        commit(self, run_dir)

    config = tmp_path / "words.yaml"
    config.write_text((worded / "experiment.yaml").read_text())
    with monkeypatch.context() as patch:
        patch.setattr(manifest.Manifest, "commit", fail)
        assert engine(config, "--out", tmp_path / "run").code == 130
    assert engine("--resume", tmp_path / "run").code == 0
    for table in ("wordings", "wording_answers"):
        name = f"{table}.parquet"
        assert (tmp_path / "run" / name).read_bytes() == (worded / name).read_bytes()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "an object of task names is expected"),
        ('{"animals": ["a"]}', "no paraphrases for 'colours'; there are those of animals"),
        ('{"animals": ["a"], "colours": "b"}', "'colours' needs a list of texts"),
        (json.dumps(OTHERS | {"animals": ["long " * 200]}), "stages.animals: the instruction and the question take"),
    ],
)
def test_a_file_that_will_not_do_is_refused_before_training(
    content: str | None,
    message: str,
    tree: dict[str, Any],
    write: Callable[..., str],
    engine: Callable[..., Any],
    tmp_path: Path,
) -> None:
    path = tmp_path / "p.json"
    if content is not None:
        path.write_text(content)
    tree["wordings"] = {"file": str(path)}
    result = engine(write(tree), "--out", tmp_path / "run")
    assert result.code == 2
    assert len(result.err.strip().splitlines()) == 1
    assert message in result.err
    assert not (tmp_path / "run").exists()


def test_a_misspelt_key_is_named(
    tree: dict[str, Any], write: Callable[..., str], engine: Callable[..., Any], tmp_path: Path
) -> None:
    tree["wordings"] = {"fil": "x"}
    result = engine(write(tree), "--out", tmp_path / "run")
    assert result.code == 2
    assert "fil" in result.err and len(result.err.strip().splitlines()) == 1


@pytest.mark.parametrize("strategy", ["Sequential", "SEQR", "OLoRA", "EWC", "ExperienceReplay", "queryable"])
def test_a_finished_run_in_its_own_words_scores_as_it_did(
    strategy: str, tree: dict[str, Any], write: Callable[..., str], engine: Callable[..., Any],
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if strategy != "queryable":
        tree["model"] |= {"adapter": LORA, "strategy": {"class_path": f"continual.strategies.{strategy}"}}
    assert engine(write(tree), "--out", tmp_path / "run").code == 0
    before = (tmp_path / "run" / "answers.parquet").read_bytes()
    (tmp_path / "own.json").write_text(json.dumps({task: [text] for task, text in OWN.items()}))
    for _ in range(2 if strategy == "queryable" else 1):  # the second time replaces the first one's rows
        assert rescore.main([str(tmp_path / "run"), "--wordings", str(tmp_path / "own.json"), "--no-wrong"]) == 0
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(tmp_path / "run")
    assert (tmp_path / "run" / "answers.parquet").read_bytes() == before
    rows, answers = read(tmp_path / "run", "wording_answers"), read(tmp_path / "run", "answers")
    trained = answers[answers["stage"] == 2][SAME].to_dict("records")
    places = {"gate", "both"} if strategy == "queryable" else {"both"}  # nothing else has a gate
    assert set(rows["where"]) == places and set(rows["wording"]) == {"own-1", "none"}
    for place in places:
        assert rows[(rows["wording"] == "own-1") & (rows["where"] == place)][SAME].to_dict("records") == trained


def test_one_key_serves_every_task_and_an_equal_instruction_is_not_wrong(
    tree: dict[str, Any], write: Callable[..., str], engine: Callable[..., Any], tmp_path: Path
) -> None:
    for stage in tree["stages"]:
        stage["task"]["init_args"] |= {
            "instruction": "Sort them.",
            "columns": {"question": "input", "answer": "target"},
        }
    (tmp_path / "suite.json").write_text(json.dumps({"suite": ["Put it in its place."]}))
    tree["wordings"] = {"file": str(tmp_path / "suite.json"), "key": "suite"}
    assert engine(write(tree), "--out", tmp_path / "run").code == 0
    rows = read(tmp_path / "run", "wordings")
    assert set(zip(rows["task"], rows["wording"], strict=True)) == {
        (task, wording) for task in OWN for wording in ("suite-1", "none")
    }


def test_what_cannot_be_scored_again_is_said(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rescore.main([str(tmp_path)]) == 2
    state, text = manifest.read(finished)
    state.complete, state.finished_stage = False, 1
    manifest.create(tmp_path / "half", text, state)
    assert rescore.main([str(tmp_path / "half")]) == 2
    assert "is not finished (stage 1 of 2 is): resume it first" in capsys.readouterr().err
    assert rescore.main([str(finished), "--options", "eaten"]) == 2
