"""``python -m continual.cli``: Lightning's subcommands on one stage, and the sequence through the same engine."""

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

import analysis.report
from continual import cli
from continual.training.module import ContinualModule

Tree = dict[str, Any]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs ``continual.cli`` in this process; returns its status and what it printed."""
    monkeypatch.setattr("sys.argv", ["cli"])
    monkeypatch.setattr(analysis.report, "write_report", lambda run_dir: run_dir / "report.html")

    def command(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in argv])
        except SystemExit as exited:  # --help and --print_config
            code = int(exited.code or 0)
        printed = capsys.readouterr()
        return code, str(printed.out), str(printed.err)

    return command


@pytest.fixture
def one_stage(tree: Tree, write: Callable[..., str], tmp_path: Path) -> str:
    """A configuration of one stage, as configs/one_stage.yaml is one."""
    trainer = tree["trainer"] | {
        "max_epochs": 6,
        "enable_progress_bar": False,
        "default_root_dir": str(tmp_path / "root"),
    }
    data = tree["data"] | {"task": tree["stages"][0]["task"], "validation_rows": 4}
    return write({"seed_everything": 0, "model": tree["model"], "data": data, "trainer": trainer}, "one.yaml")


def test_a_misspelt_key_at_the_top_is_named_with_the_near_ones(
    command: Callable, tree: dict, write: Callable[..., str], tmp_path: Path
) -> None:
    config = write(tree | {"stagse": tree["stages"]})
    code, _, err = command("run-stages", "--config", config, "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "unknown key 'stagse' in the configuration of run-stages; did you mean stages?" in err
    assert not (tmp_path / "run").exists()


def test_help_lists_the_subcommands(command: Callable) -> None:
    code, out, _ = command("--help")
    assert code == 0
    assert [
        name for name in ("fit", "validate", "test", "run-stages", "bank") if not re.search(rf"^\s+{name}\s", out, re.M)
    ] == []


@pytest.mark.parametrize("subcommand, key", [("fit", "--data.task"), ("run-stages", "--stages")])
def test_help_of_a_subcommand_lists_its_keys(command: Callable, subcommand: str, key: str) -> None:
    code, out, _ = command(subcommand, "--help")
    assert code == 0 and key in out and "--model.adapter" in out


def test_run_stages_is_the_same_run(
    finished: Path, tree: Tree, write: Callable, command: Callable, contents: Callable, tmp_path: Path
) -> None:
    code, out, err = command("run-stages", "--config", write(tree), "--out", tmp_path / "run")
    assert code == 0, err
    assert out.strip().splitlines()[-1] == str(tmp_path / "run")
    assert contents(tmp_path / "run") == contents(finished)
    assert (tmp_path / "run" / "experiment.yaml").read_bytes() == (finished / "experiment.yaml").read_bytes()


def test_run_stages_resumes_without_a_configuration(finished: Path, command: Callable) -> None:
    code, out, err = command("run-stages", "--resume", finished)
    assert code == 0, err
    assert "nothing to do" in out and out.strip().splitlines()[-1] == str(finished)


def test_run_stages_takes_lightnings_own_overrides(
    tree: Tree, write: Callable, command: Callable, tmp_path: Path
) -> None:
    argv = ("run-stages", "--config", write(tree), "--seed=3", "--trainer.max_epochs=2", "--out", tmp_path / "run")
    assert command(*argv)[0] == 0
    resolved = yaml.safe_load((tmp_path / "run" / "experiment.yaml").read_text())
    assert (resolved["seed"], resolved["trainer"]["max_epochs"], resolved["name"]) == (3, 2, "tiny")


@pytest.mark.parametrize("subcommand", ["fit", "run-stages"])
def test_print_config_gives_a_configuration(
    tree: Tree, one_stage: str, write: Callable, command: Callable, subcommand: str
) -> None:
    path = one_stage if subcommand == "fit" else write(tree)
    code, out, _ = command(subcommand, "--config", path, "--print_config")
    printed = yaml.safe_load(out)
    assert code == 0 and printed["model"]["adapter"]["init_args"]["num_atoms"] == 4
    again = command(subcommand, "--config", write(out, "printed.yaml"), "--print_config")[1]
    assert yaml.safe_load(again) == printed


def test_fit_learns_and_test_scores_what_was_learnt(
    one_stage: str, command: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    step = ContinualModule.training_step

    def watched(self: ContinualModule, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(ContinualModule, "training_step", watched)
    code, out, err = command("fit", "--config", one_stage)
    assert code == 0, err
    assert out.strip().splitlines()[-1] == str(tmp_path / "root")
    third = len(losses) // 3
    assert sum(losses[-third:]) < 0.9 * sum(losses[:third])

    (checkpoint,) = (tmp_path / "root").rglob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state and all("queryable" in name for name in state)  # the adapter alone
    assert any(tensor.abs().sum() > 0 for name, tensor in state.items() if "queryable_B" in name)  # starts at zero

    loaded: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(
        ContinualModule, "on_test_end", lambda self: loaded.update({k: v.clone() for k, v in self.state_dict().items()})
    )
    code, out, err = command("test", "--config", one_stage, "--ckpt_path", checkpoint)
    assert code == 0, err
    assert "accuracy" in out
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("subcommand", ["validate", "test"])
def test_one_stage_is_scored_by_hand(one_stage: str, command: Callable, subcommand: str) -> None:
    code, out, err = command(subcommand, "--config", one_stage)
    assert code == 0, err
    (score,) = re.findall(r"accuracy\W+([\d.]+)", out)
    assert 0 <= float(score) <= 1


@pytest.mark.parametrize(
    "argv, words",
    [
        (["fit", "--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["fit", "--config", "{one}", "--trainer.max_epoch=3"], ["--trainer.max_epoch"]),
        (["fit", "--config", "{one}", "--model.adapter.num_atom=3"], ["model.adapter", "'num_atom'", "num_atoms"]),
        (["fit", "--config", "{one}", "--model.optimizer=os.system"], ["model.optimizer", "os.system"]),
        (["run-stages", "--config", "{tiny}", "--sede=3"], ["--sede"]),
        (["run-stages", "--config", "{tiny}", "--model.adapter.top_k=9"], ["top_k (9)"]),
        (["run-stages", "--config", "{tiny}", "--stages=[]"], ["at least one stage"]),
        (["run-stages"], ["model.backbone"]),
        (["run-stages", "--resume", "nowhere"], ["nowhere holds no run"]),
        (["run-stages", "--resume"], ["--resume"]),
        (["run-stages", "--resume", "nowhere", "--config", "{tiny}"], ["--resume takes nothing beside it"]),
        (["run-stages", "--config", "{tiny}", "--out", "{tiny}"], ["not an empty directory"]),
        (["fitt"], ["'fitt'", "run-stages"]),
    ],
)
def test_a_wrong_command_line_ends_with_2_on_one_line(
    tree: Tree, one_stage: str, write: Callable, command: Callable, argv: list[str], words: list[str]
) -> None:
    names = {"one": one_stage, "tiny": write(tree)}
    code, out, err = command(*[argument.format(**names) for argument in argv])
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert [word for word in words if word not in err] == [], err


def test_the_private_names_that_are_overridden_exist() -> None:
    """They are no part of Lightning's interface: when this fails, look at what takes their place."""
    for name in (
        "_add_subcommands",
        "_set_seed",
        "instantiate_classes",
        "_run_subcommand",
        "init_parser",
        "parse_arguments",
    ):
        ours, theirs = (inspect.signature(getattr(owner, name)) for owner in (cli.ContinualCLI, LightningCLI))
        assert list(ours.parameters) == list(theirs.parameters), name
    calls = inspect.getsource(LightningCLI.__init__)
    assert all(f"self.{name}(" in calls for name in ("_set_seed", "instantiate_classes", "_run_subcommand"))
