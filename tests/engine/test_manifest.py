"""The manifest is replaced whole or not at all, and resuming trusts nothing else."""

import json
import os
from pathlib import Path

import pytest

from continual.errors import ConfigError, RunError
from continual.storage import manifest
from continual.storage.manifest import Manifest


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    state = Manifest(run="a-1", seed=3, config_sha256=manifest.sha256("seed: 3\n"), stages=["x", "y"])
    manifest.create(tmp_path / "run", "seed: 3\n", state)
    return tmp_path / "run"


def test_what_is_committed_is_read_back(run_dir: Path) -> None:
    state, text = manifest.read(run_dir)
    assert (state.run, state.finished_stage, state.complete, text) == ("a-1", -1, False, "seed: 3\n")
    state.finished_stage, state.tasks = 1, {"x": {"instruction": "Zähle."}}
    state.commit(run_dir)
    assert manifest.read(run_dir)[0] == state
    assert json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["format"] == 2


@pytest.mark.parametrize("where", ["dumps", "fsync", "replace"])
def test_a_crash_in_commit_leaves_the_old_manifest(run_dir: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    old = (run_dir / "manifest.json").read_bytes()
    state, _ = manifest.read(run_dir)
    state.finished_stage, state.complete = 2, True

    def crash(*arguments: object, **keywords: object) -> None:
        raise OSError("crash")

    monkeypatch.setattr(json if where == "dumps" else os, where, crash)
    with pytest.raises(OSError, match="crash"):
        state.commit(run_dir)
    monkeypatch.undo()
    assert (run_dir / "manifest.json").read_bytes() == old
    assert manifest.read(run_dir)[0].finished_stage == -1
    state.commit(run_dir)  # what the crash left behind is in nobody's way
    assert manifest.read(run_dir)[0].finished_stage == 2


def test_an_edited_configuration_is_noticed(run_dir: Path) -> None:
    (run_dir / "experiment.yaml").write_text("seed: 4\n")
    with pytest.raises(ConfigError, match=r"experiment\.yaml was edited"):
        manifest.read(run_dir)


@pytest.mark.parametrize("text", ["", '{"run": "a-1"', '{"run": "a-1"}', '{"unknown": 1}', "[]"])
def test_a_damaged_manifest_is_named(run_dir: Path, text: str) -> None:
    (run_dir / "manifest.json").write_text(text)
    with pytest.raises(RunError, match=r"manifest\.json is damaged"):
        manifest.read(run_dir)


@pytest.mark.parametrize("missing", ["manifest.json", "experiment.yaml"])
def test_a_directory_without_a_run_is_named(run_dir: Path, missing: str) -> None:
    (run_dir / missing).unlink()
    with pytest.raises(ConfigError, match="holds no run to resume"):
        manifest.read(run_dir)


def test_only_a_new_or_empty_directory_takes_a_run(run_dir: Path, tmp_path: Path) -> None:
    manifest.check_new(tmp_path / "new" / "deep")
    (tmp_path / "empty").mkdir()
    manifest.check_new(tmp_path / "empty")
    (tmp_path / "file").write_text("text")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("text")
    for path, words in (
        (run_dir, "holds a run already"),
        (tmp_path / "file", "not an empty directory"),
        (tmp_path / "full", "not an empty directory"),
        (tmp_path / "file" / "below", "cannot be made"),
    ):
        with pytest.raises(ConfigError, match=words):
            manifest.check_new(path)


def test_the_environment_names_what_numbers_depend_on() -> None:
    facts = manifest.environment("cpu", 1)
    assert {"torch", "transformers", "peft", "lightning", "python"} <= set(facts)
    assert (facts["device"], facts["threads"]) == ("cpu", 1)
