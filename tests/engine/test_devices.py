"""Two devices give what one gives: the same rows, the same scores and routes up to rounding, written by one process."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import yaml
from forking import Forks
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.autograd.graph import get_gradient_edge

import analysis.report
from continual import run, strategies
from continual.config import experiment
from continual.data.batch import Row
from continual.data.batch_order import token_batches
from continual.data.collate import Collator
from continual.engine.stage_loop import StageLoop
from continual.runtime import distributed
from continual.storage import manifest

ROOT = Path(__file__).resolve().parents[2]
Tree = dict[str, Any]
DDP = {"devices": 2, "strategy": "ddp"}
SHARDED = {
    "devices": 2,
    "strategy": {
        "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
    },
}
# A batch of 11 of 12 rows, and one of a single row: a device without any. An odd number of batches to score.
UNEVEN = {"batch_size": 11, "eval_batch_tokens": 120}


def strategy(name: str, **arguments: Any) -> Tree:
    return {"class_path": f"continual.strategies.{name}", "init_args": arguments}


# What is tried, beside the configuration of all: "model.KEY" changes the module, any other key stands at the top.
SCENARIOS: dict[str, Tree] = {
    "plain": {"best_checkpoint": True, "theory": True, "general_ability": True},
    "replay": {"model.strategy": strategy("ExperienceReplay", size=5, class_balanced=True)},
    "growing": {
        "model.strategy": strategy("GrowingBank", background_rows=8, probe_rows=12),
        "token_sample": 0,  # so that rows of the first task need not be computed again; nor for a label seen since
        "data.score_seen_labels": False,
    },
    "fisher": {
        "model.strategy": strategy("EWC", weight=100.0, estimator="empirical", fisher_rows=5),
        "data.batch_size": 5,  # of 12 rows: three batches, and so a step of two and one of one
        "trainer.accumulate_grad_batches": 2,
    },
    "distilled": {"model.strategy": strategy("LwF")},
    "joint": {"model.strategy": strategy("Joint"), "bounds": ["per_task"]},
    "recorded": {"model.cuda_graphs": True},
}
QUICK = ("plain", "growing", "recorded")


@pytest.fixture(scope="module")
def forked(forks: Forks) -> Callable[..., list[int]]:
    """Runs a command line of ``continual.run`` in two processes and returns their exit codes."""

    def forked(*argv: object, **behaviour: Any) -> list[int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        words = [*map(str, argv), "--no-report"]
        arguments = (words, *(behaviour.get(key, 0) for key in ("dies", "together", "alike")))
        ranks = [
            forks.start(
                "ranks:run_rank", rank, *arguments, LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            )
            for rank in (0, 1)
        ]
        return [forks.wait(rank) for rank in ranks]

    return forked


@pytest.fixture(scope="module")
def written(base_tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a scenario's configuration, for devices or for one, and returns its path."""
    folder = tmp_path_factory.mktemp("devices")

    def written(scenario: str, trainer: Tree | None = None) -> Path:
        tree = copy.deepcopy(base_tree | {"data": UNEVEN})
        tree["trainer"] |= {"max_epochs": 2, **(trainer or {})}
        for key, value in SCENARIOS[scenario].items():
            group, _, last = key.rpartition(".")
            (tree[group] if group else tree)[last] = value
        place = folder / f"{scenario}-{'one' if trainer is None else len(str(trainer))}"
        place.mkdir(exist_ok=True)
        (place / "tiny.yaml").write_text(yaml.safe_dump(tree))
        return place / "tiny.yaml"

    return written


@pytest.fixture(scope="module")
def of_one(written: Callable[..., Path]) -> Callable[[str], Path]:
    """Returns the directory of a scenario's run on one device."""

    def of_one(scenario: str) -> Path:
        config = written(scenario)
        run_dir = config.parent / "run"
        if not run_dir.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(analysis.report, "write_report", lambda run_dir: run_dir / "report.html")
                assert run.main([str(config), "--out", str(run_dir)]) == 0
        return run_dir

    return of_one


@pytest.fixture(scope="module")
def of_two(written: Callable[..., Path], forked: Callable[..., list[int]]) -> Callable[..., Path]:
    """Returns the directory of a scenario's run on two devices."""

    def of_two(scenario: str, trainer: Tree = DDP) -> Path:
        config = written(scenario, trainer)
        run_dir = config.parent / "run"
        if not run_dir.exists():
            # Tasks share passes, as on GPUs; a single device's runs, which share none, have to come to the same.
            assert forked(config, "--out", run_dir, together=scenario != "plain") == [0, 0]
        return run_dir

    return of_two


def assert_same_run(one: Path, two: Path) -> None:
    """Compare all that two runs wrote; numbers up to rounding."""
    tables = {path.name for path in one.glob("*.parquet")}
    assert tables and tables == {path.name for path in two.glob("*.parquet")}
    for name in tables:
        # Padding counts in the one, and each share has its own.
        own = ["run", "count"] if name == "theory.parquet" else ["run"]
        of_one, of_two = (pd.read_parquet(run_dir / name).drop(columns=own) for run_dir in (one, two))
        pd.testing.assert_frame_equal(of_one, of_two, check_exact=False, rtol=1e-3, atol=1e-4, obj=name)
    answers = pd.read_parquet(two / "answers.parquet")
    assert not answers.duplicated(["stage", "task", "row"]).any()
    state, other = (json.loads((run_dir / "manifest.json").read_text()) for run_dir in (one, two))
    assert other["complete"] and state.keys() == other.keys()
    own = {
        "run",
        "config_sha256",
        "environment",
        "stage_seconds",
        "scoring_seconds",
        "milliseconds_a_row",
        "tables",
        "files",
    }
    assert {k: v for k, v in state.items() if k not in own} == {k: v for k, v in other.items() if k not in own}
    assert (state["environment"]["num_devices"], other["environment"]["num_devices"]) == (1, 2)
    files = [{str(p.relative_to(run_dir)) for p in run_dir.rglob("*") if p.is_file()} for run_dir in (one, two)]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    "scenario", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SCENARIOS]
)
def test_two_devices_give_what_one_gives(of_one: Callable, of_two: Callable, scenario: str) -> None:
    assert_same_run(of_one(scenario), of_two(scenario))
    if scenario == "replay":  # the same rows are kept
        kept = [run_dir / "strategy" / "stage-02" / "rows.parquet" for run_dir in (of_one(scenario), of_two(scenario))]
        assert kept[0].read_bytes() == kept[1].read_bytes()
    if scenario == "joint":
        assert_same_run(*(run_dir / "bounds" / "per_task" for run_dir in (of_one(scenario), of_two(scenario))))


@pytest.mark.parametrize("scenario", ["plain", pytest.param("growing", marks=pytest.mark.slow)])
def test_a_backbone_in_shards_gives_what_a_whole_one_gives(of_one: Callable, of_two: Callable, scenario: str) -> None:
    assert_same_run(of_one(scenario), of_two(scenario, SHARDED))


@pytest.mark.parametrize("dies, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_a_run_on_two_devices_that_was_killed_resumes_to_the_same_bytes(
    written: Callable, forked: Callable, of_two: Callable, contents: Callable, tmp_path: Path, dies: int, status: int
) -> None:
    run_dir = tmp_path / "run"
    codes = forked(written("plain", DDP), "--out", run_dir, dies=dies)
    assert codes[0] == status and codes[1] not in (0, -signal.SIGKILL)  # the other one ended by itself
    assert json.loads((run_dir / "manifest.json").read_text())["finished_stage"] == 1
    assert forked("--resume", run_dir) == [0, 0]
    assert contents(run_dir) == contents(of_two("plain"))


ALIKE: dict[str, Tree] = {
    "Sequential": {},
    "ExperienceReplay": {"size": 5},
    "DERPlusPlus": {"size": 5, "memory_batch_size": 3},
    "AGEM": {"size": 5, "memory_batch_size": 3},
    "EWC": {"weight": 100.0, "fisher_rows": 5},
    "OnlineEWC": {"weight": 100.0, "fisher_rows": 5},
    "LwF": {},
    "OLoRA": {},
    "NLoRA": {},
    "CLoRA": {},
    "SEQR": {},
    "ReuseBank": {"source_stages": 1},
    "GrowingBank": {"background_rows": 8, "probe_rows": 12},
    "Joint": {},
    "PerTask": {},
    "PerInstructionLookup": {},
}


def test_every_strategy_is_tried() -> None:
    assert set(ALIKE) == set(strategies.__all__) - {"Strategy"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALIKE)
def test_replicas_stay_alike_under_dropout(base_tree: Tree, forked: Callable, tmp_path: Path, name: str) -> None:
    tree = copy.deepcopy(base_tree)
    tree["trainer"] |= DDP | {"max_epochs": 2}
    tree["scoring"] = "final"
    if name in ("OLoRA", "NLoRA", "CLoRA", "SEQR"):
        lora = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
        tree["model"]["adapter"] = {"class_path": "peft.LoraConfig", "init_args": lora}
    tree["model"]["adapter"]["init_args"]["lora_dropout"] = 0.3
    tree["model"]["strategy"] = strategy(name, **ALIKE[name])
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tree))
    assert forked(tmp_path / "tiny.yaml", "--out", tmp_path / "run", alike=True) == [0, 0]


def test_a_finished_run_is_scored_again_on_one_device(of_two: Callable) -> None:
    run_dir = of_two("plain")
    state, text = manifest.read_finished(run_dir)
    sequence = StageLoop(experiment.parse(text, state.run), run_dir)
    sequence.prepare(state)
    assert sequence.experiment.make_trainer(None, run_dir, []).world_size == 1


def command(config: Path, run_dir: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in processes of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, *launcher, "-m", "continual.run", str(config), "--out", str(run_dir), "--no-report"]
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.slow
def test_lightning_starts_the_second_process(
    written: Callable, of_two: Callable, contents: Callable, tmp_path: Path
) -> None:
    done = command(written("plain", DDP), tmp_path / "run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"Run {tmp_path / 'run'}" and lines[-1] == str(tmp_path / "run")
    assert len([line for line in lines if line.startswith("(untrained)")]) == 1  # one process alone speaks
    assert "Warning" not in done.stderr and "Initializing" not in done.stderr and "error" not in done.stderr
    assert contents(tmp_path / "run") == contents(of_two("plain"))


@pytest.mark.slow
def test_torchrun_starts_both(written: Callable, of_two: Callable, contents: Callable, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = command(written("plain", DDP), tmp_path / "run", *launcher)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "run") == contents(of_two("plain"))


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["trainer.strategy=ddp_spawn"], "a run has many: take ddp"),
        (["trainer.strategy=fsdp"], "requires a GPU"),
        (
            [
                "trainer.strategy={class_path: lightning.pytorch.strategies.DDPStrategy, "
                "dict_kwargs: {broadcast_bufers: false}}"
            ],
            "DistributedDataParallel has no argument 'broadcast_bufers'",
        ),
        (["trainer.strategy={class_path: lightning.pytorch.strategies.ModelParallelStrategy}"], "tensor_parallel_size"),
        ([f"trainer.strategy={json.dumps(SHARDED['strategy'])}", "model.compile=true"], "model.compile has not been"),
        (
            [f"trainer.strategy={json.dumps(SHARDED['strategy'])}", "model.cuda_graphs=true"],
            "model.cuda_graphs has not",
        ),
        (["data.batch_size=1"], "data.batch_size (1)"),
        (["stages.*.task.init_args.test_rows=1"], "rows to score (1)"),
        (
            [
                "model.adapter={class_path: continual.adapters.MoeLoraConfig, init_args: "
                "{r: 2, top_k: 1, balance_weight: 0.1, target_modules: [q_proj]}}"
            ],
            "balances its experts over a whole batch",
        ),
        (["model.adapter={class_path: peft.LilyConfig, init_args: {r: 2, target_modules: [q_proj]}}"], "LilyConfig"),
    ],
)
def test_what_devices_cannot_share_is_refused_before_any_process_starts(
    tree: Tree, write: Callable, engine: Callable, tmp_path: Path, overrides: list[str], words: str
) -> None:
    result = engine(write(tree), "trainer.devices=2", *overrides, "--out", tmp_path / "run")
    assert result.code == 2 and result.err.count("\n") == 1 and words in result.err
    assert not (tmp_path / "run").exists()


def test_processes_that_the_trainer_does_not_ask_for_are_refused(
    tree: Tree, write: Callable, engine: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = engine(write(tree), "--out", tmp_path / "run")
    assert result.code == 2 and "2 processes were started and trainer.devices" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_backend_that_torch_does_not_know_is_one_line(written: Callable, tmp_path: Path) -> None:
    asked = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"process_group_backend": "pigeon"}}
    done = command(written("plain", DDP | {"strategy": asked}), tmp_path / "run")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "error: trainer: Unknown backend type pigeon"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("num_rows, num_processes", [(7, 3), (6, 3), (2, 3), (1, 4)])
def test_the_shares_of_a_batch_are_the_batch(num_rows: int, num_processes: int) -> None:
    backbone: Any = type("Backbone", (), {"kind": "causal_lm", "tokenizer": type("T", (), {"pad_token_id": 0})})
    rows = [Row({"row": i}, "", [1] * (i + 1), [2] * (i % 3 + 1)) for i in range(num_rows)]
    shares = [
        Collator(backbone, False, answers=True, share=slice(rank, None, num_processes))(rows)
        for rank in range(num_processes)
    ]
    whole = Collator(backbone, False, answers=True)(rows)
    assert whole["weight"] == 1
    counted = [batch for batch in shares if batch["weight"]]
    assert sorted(row["row"] for batch in counted for row in batch["rows"]) == list(range(num_rows))
    # The mean over processes of (weight x a share's mean over tokens) is the mean over all tokens.
    values = {row.source["row"]: float(index) for index, row in enumerate(rows)}

    def token_mean(batch: Tree) -> float:
        sizes = [len(rows[row["row"]].answer_ids) for row in batch["rows"]]
        return float(np.average([values[row["row"]] for row in batch["rows"]], weights=sizes))

    assert np.mean([batch["weight"] * token_mean(batch) for batch in shares]) == pytest.approx(token_mean(whole))


def test_as_many_batches_as_devices_are_scored() -> None:
    lengths = [5, 9, 2, 7, 7, 1]
    assert len(token_batches(lengths, extra=0, max_tokens=10**6)) == 1
    for least in (2, 3, 4, 6, 9):
        batches = token_batches(lengths, extra=0, max_tokens=10**6, least=least)
        assert len(batches) >= min(least, len(lengths))
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))


def _wrapping(asked: str | DDPStrategy, records: bool) -> DDPStrategy:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy=asked, logger=False)
    distributed.configure_ddp(trainer, records)
    assert isinstance(trainer.strategy, DDPStrategy)
    return trainer.strategy


def test_ddp_leaves_out_what_nobody_needs_unless_it_is_asked_for() -> None:
    spared = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    assert _wrapping("ddp", records=False)._ddp_kwargs == spared
    asked = DDPStrategy(broadcast_buffers=True, static_graph=True)
    assert _wrapping(asked, records=True)._ddp_kwargs == spared | {"broadcast_buffers": True, "static_graph": True}


@pytest.mark.parametrize("records", [False, True])
def test_gradients_are_added_up_where_they_are_computed(records: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded ones are not: a recording may touch nothing that came on the stream of other work."""

    def notes(edge: Any) -> dict[str, bool]:
        return edge.node.metadata  # as long as the node is there

    def marked(parameter: nn.Parameter) -> Any:
        edge = get_gradient_edge(parameter)
        notes(edge)["is here"] = True
        return edge

    def wrap(self: DDPStrategy, model: nn.Module) -> list[bool]:
        return ["is here" in notes(get_gradient_edge(parameter)) for parameter in model.parameters()]

    monkeypatch.setattr(distributed, "get_gradient_edge", marked)
    monkeypatch.setattr(DDPStrategy, "_setup_model", wrap)
    found: Any = _wrapping("ddp", records)._setup_model(nn.Linear(2, 2))
    assert found == [not records] * 2
