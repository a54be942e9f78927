"""``python -m continual.run`` from end to end: what it leaves, that it repeats itself, and how it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from continual import run
from continual.engine.stage_loop import StageLoop
from continual.training.module import ContinualModule

ROOT = Path(__file__).resolve().parents[2]
Tree = dict[str, Any]
TABLES = {"scores", "answers", "routing", "usage_halves", "gradients", "tokens"}


def test_the_command_runs_the_smoke_configuration(tmp_path: Path) -> None:
    """In a process of its own, with the report: the words on both streams are those a person sees."""
    command = [sys.executable, "-m", "continual.run", str(ROOT / "configs" / "smoke.yaml"), "--out", "deep/smoke"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Run deep/smoke" and lines[-1] == "deep/smoke"
    assert "Warning" not in done.stderr and "error" not in done.stderr
    for words in ("parameters train", "letter_counting", "(untrained)", "scores after", "Report: "):
        assert words in done.stdout
    run_dir = tmp_path / "deep" / "smoke"
    state = json.loads((run_dir / "manifest.json").read_text())
    assert state["complete"] and state["finished_stage"] == 2 and state["stages"] == ["letter_counting", "aiw"]
    assert set(state["stage_seconds"]) == set(state["scoring_seconds"]) == {"0", "1", "2"}
    assert all(state["scoring_seconds"][stage] <= spent for stage, spent in state["stage_seconds"].items())
    assert {path.stem for path in run_dir.glob("*.parquet")} == TABLES
    assert (run_dir / "report" / "report.html").is_file()
    assert sorted(path.name for path in (run_dir / "adapters").iterdir()) == ["stage-00", "stage-01", "stage-02"]
    scores = pd.read_parquet(run_dir / "scores.parquet")
    assert len(scores) == 3 * 2 and set(scores["run"]) == {state["run"]}


def test_rows_and_weights_of_a_finished_run(finished: Path, contents: Callable[[Path], dict[str, bytes]]) -> None:
    names = set(contents(finished))
    assert {Path(name).stem for name in names if name.endswith(".parquet")} == TABLES
    scores = pd.read_parquet(finished / "scores.parquet")
    assert set(zip(scores["stage"], scores["task"], strict=True)) == {
        (s, t) for s in (0, 1, 2) for t in ("animals", "colours")
    }
    answers = pd.read_parquet(finished / "answers.parquet")
    means = {key: group["value"].mean() for key, group in answers.groupby(["stage", "task"])}
    accuracies = scores[scores["metric"] == "accuracy"].set_index(["stage", "task"])["value"].to_dict()
    assert accuracies == pytest.approx(means)
    gradients = pd.read_parquet(finished / "gradients.parquet")
    assert set(zip(gradients["stage"], gradients["task"], strict=True)) == {(1, "animals"), (2, "colours")}
    steps = [group["step"].max() for _, group in gradients[gradients["metric"] == "train_loss"].groupby("stage")]
    assert (
        len(steps) == 2 and 0 not in steps
    )  # each stage trained: a Trainer that is used twice would not train the second
    weights = [load_file(finished / "adapters" / f"stage-0{stage}" / "adapter_model.safetensors") for stage in range(3)]
    for before, after in zip(weights, weights[1:], strict=False):
        assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(
    finished: Path, tree: Tree, write: Callable[..., str], engine: Callable, contents: Callable, tmp_path: Path
) -> None:
    assert engine(write(tree), "--out", tmp_path / "again").code == 0
    assert engine(write(tree), "seed=1", "--out", tmp_path / "other").code == 0
    first, again, other = contents(finished), contents(tmp_path / "again"), contents(tmp_path / "other")
    assert set(first) == set(again) == set(other) and len(first) == 6 + 3 * 2
    assert [name for name in first if first[name] != again[name]] == []
    assert [name for name in first if name.endswith(("parquet", "safetensors")) and first[name] == other[name]] == []
    weights = [
        load_file(folder / "adapters" / "stage-00" / "adapter_model.safetensors")
        for folder in (finished, tmp_path / "other")
    ]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    values = [
        pd.read_parquet(folder / "gradients.parquet")["value"].tolist() for folder in (finished, tmp_path / "other")
    ]
    assert values[0] != values[1]


def test_the_resolved_file_gives_the_same_run(
    finished: Path, engine: Callable, contents: Callable, tmp_path: Path
) -> None:
    assert engine(finished / "experiment.yaml", "--out", tmp_path / "again").code == 0
    again = contents(tmp_path / "again")
    assert [name for name, data in contents(finished).items() if again[name] != data] == []
    assert (tmp_path / "again" / "experiment.yaml").read_bytes() == (finished / "experiment.yaml").read_bytes()


def test_the_directory_has_a_name_by_default(
    tree: Tree, write: Callable, engine: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StageLoop, "run", lambda self: None)
    result = engine(write(tree))
    assert result.code == 0 and result.last_line.startswith("runs/tiny-")
    assert (tmp_path / result.last_line / "manifest.json").is_file()


def test_a_regression_sequence_runs(engine: Callable, tmp_path: Path) -> None:
    result = engine(
        ROOT / "configs" / "regression.yaml",
        "--out",
        tmp_path / "run",
        "trainer.max_epochs=1",
        "model.adapter.init_args.prior_weight=0",  # the instruction encoder is another package
        "stages.*.task.init_args.train_rows=32",
        "stages.*.task.init_args.test_rows=16",
    )
    assert result.code == 0, result.err
    scores = pd.read_parquet(tmp_path / "run" / "scores.parquet")
    assert set(scores["metric"]) == {"r2", "rmse"} and set(scores["stage"]) == set(range(7))


def test_the_report_can_be_left_out(
    tree: Tree, write: Callable, engine: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr("analysis.report.write_report", drawn.append)
    result = engine(write(tree), "--out", tmp_path / "run", "--no-report")
    assert (result.code, result.last_line, drawn) == (0, str(tmp_path / "run"), [])
    assert "no report" not in engine("--resume", tmp_path / "run", "--no-report").out


def test_a_report_that_fails_does_not_undo_the_run(
    tree: Tree, write: Callable, engine: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run_dir: Path) -> Path:
        raise ValueError("no\nink")

    monkeypatch.setattr("analysis.report.write_report", fail)
    monkeypatch.setattr(StageLoop, "run", lambda self: None)
    result = engine(write(tree), "--out", tmp_path / "run")
    assert result.code == 0 and result.last_line == str(tmp_path / "run")
    assert result.err.splitlines()[-1].startswith("the report failed: no ink; try python -m analysis.report")


# -- any PEFT method by the same door ---------------------------------------------------------------------------------

PEFT_METHODS = {
    "LoraConfig": {"r": 2, "target_modules": ["q_proj"]},
    # Ranks that are to stay as they are.
    "AdaLoraConfig": {"init_r": 2, "target_r": 2, "total_step": 10, "target_modules": ["q_proj"]},
    "LilyConfig": {"r": 2, "target_modules": ["q_proj"]},
    "VBLoRAConfig": {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2, "target_modules": ["q_proj"]},
    "IA3Config": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "VeraConfig": {"r": 4, "target_modules": ["q_proj"]},
    "DeloraConfig": {"r": 2, "target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("name", PEFT_METHODS)
def test_any_peft_method_trains_through_the_same_door(
    tree: Tree, write: Callable, engine: Callable, tmp_path: Path, name: str
) -> None:
    tree["model"]["adapter"] = {"class_path": f"peft.{name}", "init_args": PEFT_METHODS[name]}
    del tree["stages"][1:]
    result = engine(write(tree), "--out", tmp_path / "run")
    assert result.code == 0, result.err
    weights = [
        load_file(tmp_path / "run" / "adapters" / f"stage-0{stage}" / "adapter_model.safetensors") for stage in (0, 1)
    ]
    assert set(weights[0]) == set(weights[1])
    assert any(not torch.equal(weights[0][tensor], weights[1][tensor]) for tensor in weights[0])
    facts = json.loads((tmp_path / "run" / "manifest.json").read_text())["model"]
    assert facts["trainable_parameters"] > 0 and facts["num_atoms"] is None


# -- refusals ---------------------------------------------------------------------------------------------------------


def gguf(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(range(40)))
    arguments = {"model": str(tmp_path / "cut.gguf"), "cache_dir": str(tmp_path / "cache")}
    tree["model"]["backbone"] = {"class_path": "continual.backbones.CausalLM", "init_args": arguments}


def files(name: str, content: str | None) -> Callable[[Tree, Path], None]:
    def change(tree: Tree, tmp_path: Path) -> None:
        if content is not None:
            (tmp_path / name).write_text(content)
        tree["stages"][1]["task"]["init_args"] |= {"folder": str(tmp_path), "train_file": name, "test_file": None}

    return change


def adapter(**values: Any) -> Callable[[Tree, Path], None]:
    return lambda tree, tmp_path: tree["model"]["adapter"]["init_args"].update(values)


def regression(tree: Tree, tmp_path: Path) -> None:
    tree["stages"][1]["task"] = {"class_path": "tasks.RegressionTask", "init_args": {"function": "friedman"}}


# What shows only when the data or the model is read; what the parser finds is in test_experiment.
REFUSED: dict[str, tuple[Callable[[Tree, Path], None], list[str]]] = {
    "unknown key": (adapter(num_atom=3), ["model.adapter", "'num_atom'", "num_atoms"]),
    "task file missing": (files("gone.csv", None), ["stages.colours", "gone.csv"]),
    "task file empty": (files("empty.csv", ""), ["stages.colours", "empty.csv"]),
    "task file without rows": (files("bare.csv", "input,target\n"), ["stages.colours", "bare.csv"]),
    "task file lacks a column": (files("short.csv", "input,goal\na,warm\nb,cold\n"), ["stages.colours", "'target'"]),
    "label outside the list": (
        files("odd.csv", "input,target\na,warm\nb,tepid\n"),
        ["stages.colours", "row 1", "'tepid'"],
    ),
    "task file is no parquet": (files("bad.parquet", "text"), ["stages.colours", "bad.parquet"]),
    "num_blocks above the layers": (adapter(num_blocks=9), ["model.adapter", "num_blocks", "9"]),
    "target module unmatched": (adapter(target_modules=["q_proj", "qq_proj"]), ["model.adapter", "qq_proj"]),
    "regression on a language model": (regression, ["stages.colours", "regression", "TinyCausalLM"]),
    "GGUF file cut short": (gguf, ["cut.gguf", "cut short"]),
    "batch of no rows": (lambda tree, _: tree["data"].update(batch_size=0), ["data.batch_size", "got 0"]),
    "rows too long": (lambda tree, _: tree["data"].update(max_tokens=20), ["stages.animals", "tokens"]),
    "nothing left to train on": (lambda tree, _: tree["data"].update(validation_rows=99), ["data.validation_rows"]),
    "only some test rows": (
        lambda tree, _: tree["trainer"].update(limit_test_batches=3),
        ["trainer.limit_test_batches=3", "test_rows"],
    ),
    "one batch of everything": (
        lambda tree, _: tree["trainer"].update(fast_dev_run=True),
        ["trainer.fast_dev_run=True", "test_rows"],
    ),
    "a learning rate below 0": (
        lambda tree, _: tree["model"]["optimizer"]["init_args"].update(lr=-1.0),
        ["model.optimizer: ", "-1.0"],
    ),
    "a field too many": (
        files("many.csv", "input,target\na,b,warm\nc,d,cold\n"),
        ["stages.colours", "line 2 has 3 fields and the header 2"],
    ),
    "unknown accelerator": (lambda tree, _: tree["trainer"].update(accelerator="abacus"), ["trainer", "abacus"]),
    "unknown dataset": (
        lambda tree, _: tree["stages"][1].update(
            task={"class_path": "tasks.ReasoningTask", "init_args": {"dataset": "awi"}}
        ),
        ["stages.colours", "'awi'", "aiw"],
    ),
    "adapter to start from is missing": (
        lambda tree, _: tree["model"].update(start_from="nowhere"),
        ["model.start_from", "nowhere"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_ends_with_2_one_line_and_nothing_written(
    tree: Tree, write: Callable, engine: Callable, tmp_path: Path, name: str
) -> None:
    change, words = REFUSED[name]
    change(tree, tmp_path)
    result = engine(write(tree), "--out", tmp_path / "deep" / "run")
    errors = [line for line in result.err.splitlines() if not line.startswith("Unpacking ")]
    assert result.code == 2, result.err
    assert len(errors) == 1 and errors[0].startswith("error: "), result.err
    assert [word for word in words if word not in errors[0]] == [], errors[0]
    assert result.out == "" and not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    "argv, words",
    [
        ([], ["give a configuration file, or --resume DIR"]),
        (["nowhere.yaml"], ["cannot read the configuration nowhere.yaml", "No such file"]),
        (["."], ["cannot read the configuration ."]),
        (["{config}", "--resume", "somewhere"], ["--resume takes no configuration"]),
        (["--resume", "somewhere", "--out", "there"], ["--resume takes no configuration, --out"]),
        (["--resume", "somewhere"], ["somewhere holds no run to resume"]),
        (["{config}", "--ot", "there"], ["--ot"]),
        (["{config}", "--out"], ["--out"]),
        (["{config}", "seed"], ["'seed'", "dotted.key=value"]),
        (["{config}", "stages.nope.max_epochs=1"], ["'nope'", "animals, colours"]),
        (["{scalar}"], ["has to be a mapping"]),
        (["{malformed}"], ["not valid YAML"]),
        (["{binary}"], ["cannot read the configuration"]),
        (["{config}", "--out", "{config}"], ["not an empty directory"]),
        (["{config}", "--out", "{config}/below"], ["cannot be made"]),
    ],
)
def test_a_wrong_command_line_ends_with_2(
    tree: Tree,
    write: Callable,
    engine: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {
        "config": write(tree),
        "scalar": write("3", "3.yaml"),
        "malformed": write("a: [1", "m.yaml"),
        "binary": str(tmp_path / "b"),
    }
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    before = sorted(tmp_path.iterdir())
    result = engine(*[argument.format(**names) for argument in argv])
    assert result.code == 2 and result.out == ""
    assert result.err.count("\n") == 1 and result.err.startswith("error: ")
    assert [word for word in words if word not in result.err] == [], result.err
    assert sorted(tmp_path.iterdir()) == before


def test_another_run_is_left_alone(
    finished: Path, tree: Tree, write: Callable, engine: Callable, contents: Callable
) -> None:
    before = contents(finished)
    result = engine(write(tree), "--out", finished)
    assert result.code == 2 and "holds a run already" in result.err and "--resume" in result.err
    assert contents(finished) == before


def test_help_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(["--help"])
    assert caught.value.code == 0
    assert "--resume DIR" in capsys.readouterr().out


def test_a_stage_that_trains_no_step_fails(tree: Tree, write: Callable, engine: Callable, tmp_path: Path) -> None:
    result = engine(write(tree), "trainer.max_steps=0", "--out", tmp_path / "run")
    assert result.code == 1 and result.err.splitlines()[-1].startswith("error: stage 'animals' trained no step")


def test_the_plan_and_the_manifest_say_how_much_is_trained(
    tree: Tree, write: Callable, engine: Callable, tmp_path: Path
) -> None:
    limits = ["trainer.limit_train_batches=2", "trainer.max_epochs=3", "trainer.accumulate_grad_batches=2"]
    for name, changes, steps in (("run", limits, 3), ("other", ["trainer.max_steps=2"], 2)):
        result = engine(write(tree), *changes, "--out", tmp_path / name)
        assert result.code == 0
        lines = [line.split() for line in result.out.splitlines()]
        assert [line[-1] for line in lines if line[1:2] in (["animals"], ["colours"])][:2] == [str(steps)] * 2
        state = json.loads((tmp_path / name / "manifest.json").read_text())
        assert state["trained_steps"] == {"1": steps, "2": steps}


def test_a_gpu_out_of_memory_is_one_line(
    tree: Tree, write: Callable, engine: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own message lists every process on the GPU."""

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.12 GiB. GPU 0 has a total of 80 GiB.")

    monkeypatch.setattr(ContinualModule, "training_step", full)
    result = engine(write(tree), "--out", tmp_path / "run")
    assert result.code == 1 and result.err.splitlines()[-1] == (
        "error: stage 'animals': CUDA out of memory. Tried to allocate 1.12 GiB; take a smaller data.batch_size or "
        "data.eval_batch_tokens, or let fewer runs share the GPU"
    )


def test_an_adapter_starts_from_another_runs(
    finished: Path, tree: Tree, write: Callable, engine: Callable, tmp_path: Path
) -> None:
    start = finished / "adapters" / "stage-02"
    assert (
        engine(write(tree), f"model.start_from={start}", "stages.*.max_epochs=1", "--out", tmp_path / "run").code == 0
    )
    weights = [load_file(f / "adapter_model.safetensors") for f in (start, tmp_path / "run" / "adapters" / "stage-00")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_modules_are_checked_before_anything_is_written(
    tree: Tree, write: Callable, engine: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of ours inside the model's own code is not mistaken for the user's: it comes with its traceback."""

    def fail(self: ContinualModule) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(ContinualModule, "configure_model", fail)
    with pytest.raises(KeyError, match="a bug"):
        engine(write(tree), "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_resolved_file_is_the_whole_configuration(finished: Path) -> None:
    resolved = yaml.safe_load((finished / "experiment.yaml").read_text())
    assert resolved["name"] == "tiny" and resolved["data"]["max_tokens"] == 512
    assert resolved["model"]["adapter"]["init_args"]["prior_temperature"] == 1.0
