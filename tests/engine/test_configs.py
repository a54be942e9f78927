"""Every file in configs/ is a test case: it parses, it builds its objects, and what it resolves to says the same."""

from pathlib import Path

import pytest
import yaml

from continual import cli, experiment, sweep_plan

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
SWEEPS = [path for path in CONFIGS if "methods" in yaml.safe_load(path.read_text())]
SEQUENCES = [path for path in CONFIGS if "stages" in yaml.safe_load(path.read_text())]
SINGLE_STAGES = [path for path in CONFIGS if path not in SEQUENCES + SWEEPS]


def test_there_are_configurations_of_every_sort() -> None:
    assert SEQUENCES and SINGLE_STAGES and SWEEPS


@pytest.mark.parametrize("path", SEQUENCES, ids=lambda path: path.stem)
def test_a_sequence_parses_builds_and_resolves_to_itself(path: Path) -> None:
    first = experiment.load(path)
    assert first.name.startswith(f"{path.stem}-")
    assert len(first.stages) == len(yaml.safe_load(path.read_text())["stages"])
    again = experiment.parse(first.resolved, "another-stem")
    assert (again.resolved, again.name) == (first.resolved, first.name)


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_parses_and_the_files_it_leaves_say_the_same(path: Path, tmp_path: Path) -> None:
    first = sweep_plan.load(path)
    for name, text in first.files().items():
        (tmp_path / name).write_text(text)
    assert sweep_plan.load(tmp_path / sweep_plan.SWEEP_NAME) == first


@pytest.mark.parametrize("path", SINGLE_STAGES, ids=lambda path: path.stem)
def test_a_single_stage_parses_and_builds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(
        cli.ContinualCLI, "_run_subcommand", lambda self, name: built.append((self.model, self.datamodule))
    )
    monkeypatch.setattr("sys.argv", ["cli"])
    assert cli.main(["fit", "--config", str(path), "--trainer.accelerator=cpu"]) == 0
    ((module, data),) = built
    assert module.backbone.kind == "causal_lm"
    assert data.task.instruction
