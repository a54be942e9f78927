"""What tests of the engine share: a configuration that runs in a second, its tables, and one finished run of it."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

import analysis.report
from continual import run

WORDS = {
    "animals": {"bird": ["robin", "heron", "finch", "crane", "raven"], "fish": ["trout", "perch", "bream", "roach"]},
    "colours": {"warm": ["red", "orange", "amber", "scarlet"], "cold": ["blue", "teal", "navy", "azure", "cyan"]},
}


@dataclass
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line on standard output."""
        return self.out.strip().splitlines()[-1]


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two small label tables, ``NAME.train.parquet`` and ``NAME.test.parquet``."""
    folder = tmp_path_factory.mktemp("tables")
    for name, words in WORDS.items():
        rows = [
            {"input": f"Is {word} a {label}? {i}", "target": label}
            for i in range(2)
            for label in words
            for word in words[label]
        ]
        frame = pd.DataFrame(rows).assign(instruction=f"Sort the {name}.")
        frame[::3].to_parquet(folder / f"{name}.test.parquet")
        frame.drop(frame.index[::3]).to_parquet(folder / f"{name}.train.parquet")
    return folder


@pytest.fixture(scope="session")
def base_tree(tables: Path) -> dict[str, Any]:
    """A two-stage experiment on a random model of two layers."""

    def stage(name: str) -> dict[str, Any]:
        files = {"train_file": f"{name}.train.parquet", "test_file": f"{name}.test.parquet"}
        arguments = {"folder": str(tables), **files, "labels": list(WORDS[name])}
        return {"name": name, "task": {"class_path": "tasks.TextTask", "init_args": arguments}}

    adapter = {
        "r": 2,
        "num_atoms": 4,
        "top_k": 2,
        "num_blocks": 2,
        "prior_dim": 4,
        "target_modules": ["q_proj", "v_proj"],
    }
    return {
        "seed": 0,
        "threads": 1,
        "model": {
            "backbone": {"class_path": "continual.backbones.TinyCausalLM", "init_args": {"num_layers": 2}},
            "adapter": {"class_path": "continual.adapters.QueryableLoraConfig", "init_args": adapter},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            "warmup_steps": 1,
        },
        "data": {"batch_size": 4},
        "trainer": {"accelerator": "cpu"},
        "stages": [stage(name) for name in WORDS],
    }


@pytest.fixture
def tree(base_tree: dict[str, Any]) -> dict[str, Any]:
    """A copy of the experiment, to change."""
    return copy.deepcopy(base_tree)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a configuration into the test's folder and returns its path."""

    def write(tree: Any, name: str = "tiny.yaml") -> str:
        path = tmp_path / name
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return str(path)

    return write


@pytest.fixture
def engine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs ``continual.run`` in this process, without the report (which takes longer than the run)."""
    monkeypatch.setattr(analysis.report, "write_report", lambda run_dir: run_dir / "report.html")

    def engine(*argv: object) -> Result:
        capsys.readouterr()
        code = run.main([str(argument) for argument in argv])
        printed = capsys.readouterr()
        return Result(code, str(printed.out), str(printed.err))

    return engine


@pytest.fixture(scope="session")
def finished(base_tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a finished run of the experiment (named tiny), to read only."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(base_tree))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis.report, "write_report", lambda run_dir: run_dir / "report.html")
        assert run.main([str(folder / "tiny.yaml"), "--out", str(folder / "run")]) == 0
    yield folder / "run"


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Returns the bytes of a run's tables and adapter weights, by path."""

    def contents(run_dir: Path) -> dict[str, bytes]:
        files = [*run_dir.glob("*.parquet"), *run_dir.glob("adapters/*/adapter_*")]
        return {str(file.relative_to(run_dir)): file.read_bytes() for file in files}

    return contents
