"""Every file in configs/ is a test case: it parses, it builds its objects, and what it resolves to says the same."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from continual import cli
from continual.config import experiment
from continual.storage import manifest, records
from continual.sweeps import plan as sweep_plan

FOLDER = Path(__file__).resolve().parents[2] / "configs"
CONFIGS = [path for folder in (FOLDER, FOLDER / "paper") for path in sorted(folder.glob("*.yaml"))]
STUDIES = sorted((FOLDER / "studies").glob("*.yaml"))
SWEEPS = [path for path in CONFIGS if "methods" in yaml.safe_load(path.read_text())]
SEQUENCES = [path for path in CONFIGS if "stages" in yaml.safe_load(path.read_text())]
SINGLE_STAGES = [path for path in CONFIGS if path not in SEQUENCES + SWEEPS]


def test_there_are_configurations_of_every_sort() -> None:
    assert SEQUENCES and SINGLE_STAGES and SWEEPS


@pytest.mark.parametrize("path", SEQUENCES, ids=lambda path: str(path.relative_to(FOLDER).with_suffix("")))
def test_a_sequence_parses_builds_and_resolves_to_itself(path: Path) -> None:
    first = experiment.load(path)
    assert first.name.startswith(f"{path.stem}-")
    assert len(first.stages) == len(yaml.safe_load(path.read_text())["stages"])
    again = experiment.parse(first.resolved, "another-stem")
    assert (again.resolved, again.name) == (first.resolved, first.name)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_is_a_sweep_that_parses_with_every_method_and_value(path: Path) -> None:
    plan = sweep_plan.load(path)
    assert plan.baseline in plan.methods and len(plan.cells()) > 4


@pytest.fixture
def parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parses the same text once: it is right or wrong every time."""
    parse = cache(experiment.parse)
    monkeypatch.setattr(experiment, "parse", lambda text, stem, where: parse(text, stem))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: str(path.relative_to(FOLDER).with_suffix("")))
def test_a_sweep_parses_and_the_files_it_leaves_say_the_same(path: Path, tmp_path: Path, parsed_once: None) -> None:
    first = sweep_plan.load(path)
    for name, text in first.files().items():
        (tmp_path / name).write_text(text)
    assert sweep_plan.load(tmp_path / sweep_plan.SWEEP_NAME) == first


@pytest.mark.parametrize("path", SINGLE_STAGES, ids=lambda path: str(path.relative_to(FOLDER).with_suffix("")))
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


def test_a_long_sequence_and_its_small_version_have_the_same_stages() -> None:
    long, small = (experiment.load(FOLDER / f"{name}.yaml").stages for name in ("long", "long_smoke"))
    assert len({stage.task.instruction for stage in long}) == len(long) == 20
    assert [(s.name, s.task.instruction) for s in long] == [(s.name, s.task.instruction) for s in small]


TINY = [
    "model.backbone={class_path: continual.backbones.TinyCausalLM, init_args: {hidden_size: 16, num_layers: 2}}",
    "model.adapter.init_args.num_blocks=2",
    "trainer={accelerator: cpu}",
    "data.max_tokens=512",
    "stages.*.task.init_args.train_rows=8",
    "stages.*.task.init_args.test_rows=6",
]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("same_instruction", TINY), pytest.param("long_smoke", [], marks=pytest.mark.slow)],
)
def test_a_sequence_runs_to_its_end(
    name: str, overrides: list[str], engine: Callable[..., Any], tmp_path: Path
) -> None:
    path = FOLDER / f"{name}.yaml"
    assert engine(path, *overrides, "--out", tmp_path / "run").code == 0
    state, _ = manifest.read(tmp_path / "run")
    assert state.complete
    scores = records.read(tmp_path / "run", "scores")
    assert len(scores) == (len(state.stages) + 1) * len(state.stages)
