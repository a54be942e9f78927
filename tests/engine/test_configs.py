"""Every file in configs/ is a test case: it parses, it builds its objects, and what it resolves to says the same."""

from pathlib import Path

import pytest
import yaml

from continual import cli, experiment

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
SEQUENCES = [path for path in CONFIGS if "stages" in yaml.safe_load(path.read_text())]
SINGLE_STAGES = [path for path in CONFIGS if path not in SEQUENCES]


def test_there_are_configurations_of_both_sorts() -> None:
    assert SEQUENCES and SINGLE_STAGES


@pytest.mark.parametrize("path", SEQUENCES, ids=lambda path: path.stem)
def test_a_sequence_parses_builds_and_resolves_to_itself(path: Path) -> None:
    first = experiment.load(path)
    assert first.name.startswith(f"{path.stem}-")
    assert len(first.stages) == len(yaml.safe_load(path.read_text())["stages"])
    again = experiment.parse(first.resolved, "another-stem")
    assert (again.resolved, again.name) == (first.resolved, first.name)


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
