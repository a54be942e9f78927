"""GrowingBank, stage by stage: what trains, what is kept, shared and pruned, and what a bank's folder gives back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from continual.adapters import GateInputs, load_bank
from continual.backbones import TinyCausalLM
from continual.cli import main
from continual.commands.bank_scores import BankScores
from continual.config import experiment
from continual.engine.stage_loop import StageLoop
from continual.errors import ConfigError
from continual.scoring import evaluate
from continual.storage import manifest
from continual.strategies import GrowingBank
from continual.strategies.bank_parts import Moments, add_slice, bank_of, components_of_A
from continual.training import module as module_file
from continual.training.module import ContinualModule

BANK: dict[str, Any] = {"instruction_encoder": "backbone", "depth": 0.5, "probe_rows": 8}
NAMES = ["task0", "task1", "task2"]
Answers = dict[tuple[str, int], tuple[str, Tensor]]


@pytest.fixture
def bank_run(sequence: Callable[..., StageLoop]) -> Callable[..., StageLoop]:
    """Return a maker of finished runs of three stages."""

    def make(**init_args: Any) -> StageLoop:
        made = sequence("GrowingBank", "queryable", num_stages=3, **(BANK | init_args))
        made.run()
        return made

    return make


def strategy_of(module: ContinualModule) -> GrowingBank:
    """Return the module's strategy."""
    assert isinstance(module.strategy, GrowingBank)
    return module.strategy


def bank_json(folder: Path) -> dict[str, Any]:
    """Return a bank's state."""
    return json.loads((folder / "bank.json").read_text())


def answers_of(run_dir: Path, folder: Path) -> Answers:
    """Return, for each task and row, the stage that the gate chose and the log-likelihood of every label."""
    found: Answers = {}
    state, text = manifest.read(run_dir)
    scores = BankScores(experiment.parse(text, state.run), run_dir, folder)
    rank, score = evaluate.label_log_likelihoods, module_file.score_batch
    last: list[Tensor] = []

    def ranked(*args: Any) -> Tensor:
        last[:] = [rank(*args)]
        return last[0]

    def scored(module: ContinualModule, task: Any, batch: dict[str, Any], *rest: Any) -> Any:
        outcome, bank = score(module, task, batch, *rest), bank_of(module)
        assert bank.chosen_B is not None
        for row, index, values in zip(batch["rows"], bank.chosen_B.tolist(), last[0], strict=True):
            found[task.instruction, row["row"]] = ([*bank.gate.stages, "none"][index], values)
        return outcome

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "label_log_likelihoods", ranked)
        patch.setattr(module_file, "score_batch", scored)
        scores.score(state)
    return found


def scores_of(folder: Path) -> dict[tuple[str, str], float]:
    """Return the scores that ``bank RUN score`` wrote, by task and metric."""
    import pandas as pd

    frame = pd.read_parquet(folder / "scores.parquet")
    return {(row.task, row.metric): row.value for row in frame.itertuples()}  # type: ignore[misc]


# -- a stage taken out ------------------------------------------------------------------------------------------------


def test_a_stage_taken_out_leaves_the_other_rows_to_the_bit(bank_run: Callable[..., StageLoop], tmp_path: Path) -> None:
    run_dir = bank_run(reuse="none").run_dir
    last, bank = run_dir / "adapters" / "stage-03", run_dir / "bank"
    before_bytes = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    before = answers_of(run_dir, last)
    assert {chosen for chosen, _ in before.values()} == set(NAMES)  # the test would show nothing otherwise
    assert main(["bank", str(run_dir), "score"]) == 0
    scores = scores_of(bank)
    for command, gone in (["drop", "task1"], "task1"), (["rollback", "task1"], "task2"), (["drop", "task0"], "task0"):
        assert main(["bank", str(run_dir), *command]) == 0
        assert main(["bank", str(run_dir), "score"]) == 0
        after = answers_of(run_dir, bank)
        left = {
            key: value for key, value in before.items() if value[0] != gone and value[0] in bank_json(bank)["stages"]
        }
        assert left
        for key, (chosen, values) in left.items():
            assert after[key][0] == chosen and torch.equal(after[key][1], values), (command, key)
        for (task, metric), value in scores_of(bank).items():
            if task in bank_json(bank)["stages"]:
                assert value == scores[task, metric], (command, task, metric)
    assert list(bank_json(bank)["stages"]) == ["task1"]
    out = tmp_path / "out"
    assert main(["bank", str(run_dir), "rollback", "task2"]) == 0
    assert main(["bank", str(run_dir), "export", "task2", "--out", str(out)]) == 0
    alone = answers_of(run_dir, out)
    for key, (chosen, values) in before.items():
        if chosen == "task2":
            assert alone[key][0] == "task2" and torch.equal(alone[key][1], values)
    assert {path: path.read_bytes() for path in before_bytes} == before_bytes


def test_an_exported_stage_is_a_bank_and_an_adapter(bank_run: Callable[..., StageLoop], tmp_path: Path) -> None:
    run = bank_run(reuse="none")
    out = tmp_path / "out"
    assert main(["bank", str(run.run_dir), "export", "task1", "--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {"bank.json", "gate.safetensors", "stage02.safetensors", "adapter_config.json", "adapter"}
    state = bank_json(out)
    assert state["slices"] == ["stage02"] and list(state["stages"]) == list(state["notes"]) == ["task1"]
    kept = {key.rpartition("|")[0] for key in load_file(out / "gate.safetensors")}
    assert kept == {"", "task1"}  # nothing of the other stages goes with it
    model = TinyCausalLM(hidden_size=16, num_layers=2).build()
    plain = PeftModel.from_pretrained(model, str(out / "adapter")).eval()
    ids, bank = torch.randint(3, 250, (2, 7)), bank_of(run.module)
    keywords = {"instruction_ids": torch.randint(3, 250, (2, 3))}
    with bank.using(["stage02"]), torch.no_grad():
        assert run.module.model is not None
        run.module.eval()
        assert torch.equal(plain(ids, **keywords).logits, run.module.model(ids, **keywords).logits)


def test_a_slice_that_others_use_stays(bank_run: Callable[..., StageLoop], capsys: pytest.CaptureFixture[str]) -> None:
    run = bank_run(reuse="read", reuse_margin=0.0, max_reads=3)
    run_dir, stages = run.run_dir, bank_json(run.run_dir / "adapters" / "stage-03")["stages"]
    readers = [stage for stage, used in stages.items() if stage != "task0" and "default" in used]
    assert readers, stages
    capsys.readouterr()
    assert main(["bank", str(run_dir), "list"]) == 0
    printed = capsys.readouterr().out.splitlines()
    first = next(line for line in printed if line.startswith("task0"))
    assert f"default (shared with {', '.join(readers)})" in first
    assert main(["bank", str(run_dir), "drop", "task0"]) == 0
    assert (run_dir / "bank" / "default.safetensors").is_file()
    assert bank_json(run_dir / "bank")["stages"] == {name: used for name, used in stages.items() if name != "task0"}
    before, after = (answers_of(run_dir, run_dir / name) for name in ("adapters/stage-03", "bank"))
    assert all(torch.equal(after[key][1], v) for key, (chosen, v) in before.items() if chosen in readers)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["{tmp}/nothing", "list"], ["holds no run"]),
        (["{run}", "drop", "tusk1"], ["'tusk1'", "'task1'"]),
        (["{run}", "rollback", "task9"], ["'task9'", "did you mean"]),
        (["{run}", "export", "task1", "--out", "{tmp}"], ["exists"]),
        (["{run}", "export", "task1"], ["--out"]),
        (["{run}", "fold"], ["'fold'"]),
        (["{run}"], ["COMMAND"]),
        (["{single}", "drop", "task0"], ["last stage"]),
        (["{plain}", "list"], ["no growing bank", "Sequential"]),
        (["{early}", "list"], ["no bank yet"]),
        (["{older}", "list"], ["after stage 1", "2 are finished"]),
    ],
)
def test_bad_input_ends_with_2_on_one_line(
    argv: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    made: dict[str, Path] = {"tmp": tmp_path, "run": run}
    for name, strategy, finished in (
        ("run", "GrowingBank", 2),
        ("plain", "Sequential", 2),
        ("early", "GrowingBank", 0),
        ("older", "GrowingBank", 2),
    ):
        made[name] = folder = tmp_path / name
        stages, text = ["task0", "task1"], "seed: 0\n"
        fields: dict[str, Any] = {
            "finished_stage": finished,
            "complete": finished == 2,
            "model": {"strategy": strategy},
        }
        manifest.create(folder, text, manifest.Manifest("r", 0, manifest.sha256(text), stages, **fields))
        if strategy == "GrowingBank":
            _write_state(folder / "adapters" / "stage-02", {"task0": ["default"], "task1": ["stage02"]})
    _write_state(made["older"] / "bank", {"task0": ["default"]}, after_stage=1)
    made["single"] = tmp_path / "single"
    manifest.create(
        made["single"], "a: 1\n", manifest.Manifest("r", 0, manifest.sha256("a: 1\n"), ["task0"], 1, complete=True)
    )
    _write_state(made["single"] / "adapters" / "stage-01", {"task0": ["default"]})
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert main(["bank", *(word.format(**made) for word in argv)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert [word for word in words if word not in err] == [], err
    assert sorted(tmp_path.rglob("*")) == before


def _write_state(folder: Path, stages: dict[str, list[str]], **more: Any) -> None:
    folder.mkdir(parents=True)
    state = {"slices": [names[0] for names in stages.values()], "stages": stages, "notes": {}, "reads": {}, "gate": {}}
    (folder / "bank.json").write_text(json.dumps(state | more))


# -- without a run ----------------------------------------------------------------------------------------------------


def test_a_loaded_bank_answers_as_the_run_does(bank_run: Callable[..., StageLoop]) -> None:
    run = bank_run()
    module, rows = run.module, [data._encoded["test"].rows[i] for i in (0, 5) for data in run.data]
    made = TinyCausalLM(hidden_size=16, num_layers=2)
    model = load_bank(made.build(), run.run_dir / "adapters" / "stage-03")
    assert not any(parameter.requires_grad for parameter in model.parameters())
    inputs = GateInputs(model, made.tokenizer)
    texts, given = [row.source["question"] for row in rows], [row.instruction for row in rows]
    keywords = inputs(texts, given)
    assert module.row_inputs is not None and module.model is not None
    expected = module.row_inputs(rows)
    assert all(torch.equal(keywords[name], tensor) for name, tensor in expected.items())
    bank = bank_of(module)
    bank.in_use = None
    module.eval()
    prompts = torch.randint(3, 250, (6, 9))
    with torch.no_grad():
        assert torch.equal(model(prompts, **keywords).logits, module.model(prompts, **keywords).logits)
        growing: Any = model.base_model.growing
        assert growing.chosen_B.tolist() == [0, 1, 2, 0, 1, 2]
        options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        together = model.generate(input_ids=prompts, **keywords, **options)
        for row in range(6):
            alone = inputs(texts[row : row + 1], given[row : row + 1])
            one = model.generate(input_ids=prompts[row : row + 1], **alone, **options)[0]
            assert torch.equal(one, together[row, : len(one)])


def test_a_folder_without_a_file_is_refused(bank_run: Callable[..., StageLoop], tmp_path: Path) -> None:
    folder = bank_run().run_dir / "adapters" / "stage-01"
    for missing in ("bank.json", "gate.safetensors", "default.safetensors", "adapter_config.json"):
        broken = shutil.copytree(folder, tmp_path / missing)
        (broken / missing).unlink()
        with pytest.raises(ConfigError, match=missing):
            load_bank(TinyCausalLM(hidden_size=16, num_layers=2).build(), broken)


# -- stage by stage ---------------------------------------------------------------------------------------------------


def test_a_stage_trains_its_own_slice_and_no_other(sequence: Callable[..., StageLoop]) -> None:
    run = sequence("GrowingBank", "queryable", num_stages=3, **BANK, prune_tolerance=0.0)
    trained: list[set[str]] = []
    original = ContinualModule.configure_optimizers

    def watched(self: ContinualModule) -> Any:
        made = original(self)
        ids = {id(p) for group in made["optimizer"].param_groups for p in group["params"]}
        trained.append({name for name, parameter in self.named_parameters() if id(parameter) in ids})
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ContinualModule, "configure_optimizers", watched)
        run.run()
    every = {name for name, _ in run.module.named_parameters() if "queryable" in name}
    for stage, name in enumerate(("default", "stage02", "stage03")):
        own = {parameter for parameter in every if name in parameter.split(".")}
        assert own and trained[stage] == own
    folders = [run.run_dir / "adapters" / f"stage-{stage:02d}" for stage in (1, 2, 3)]
    for first, name in enumerate(("default", "stage02")):
        kept = [(folder / f"{name}.safetensors").read_bytes() for folder in folders[first:]]
        assert kept == kept[:1] * len(kept)
    assert any(
        tensor.abs().max() > 0 for name, tensor in load_file(folders[0] / "default.safetensors").items() if "|B" in name
    )


def test_a_new_slice_centres_instructions_as_the_first_does(sequence: Callable[..., StageLoop]) -> None:
    module = sequence("GrowingBank", "queryable", **BANK).module
    add_slice(module, "stage02")
    banks: Any = module.model.base_model.queryable_bank  # type: ignore[union-attr]
    first, second = (banks[name].instruction_reference for name in ("default", "stage02"))
    assert first.any() and torch.equal(first, second)


def test_no_training_row_is_kept(sequence: Callable[..., StageLoop]) -> None:
    rows = 37  # a size that nothing else has
    run = sequence("GrowingBank", "queryable", num_stages=2, rows=rows, **BANK)
    run.run()
    folder = run.run_dir / "adapters" / "stage-02"
    tensors = {f"{path.stem}|{k}": v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    gate = {name: tensor for name, tensor in tensors.items() if name.startswith("gate|")}
    # Two labels a stage and four clusters of the background, features and encodings of 16 numbers, the covariance's
    # half: nothing grows with the rows.
    assert sum(tensor.numel() for tensor in gate.values()) == 2 * (2 * 17 + 1 + 16) + 4 * 17 + 16 * 17 // 2 + 1
    assert not [name for name, tensor in tensors.items() if rows in tensor.shape]
    assert "red" not in (folder / "bank.json").read_text()
    assert not (run.run_dir / "strategy").exists()
    stored = run.module.strategy.stored_parameters(run.module)
    assert stored == sum(tensor.numel() for tensor in tensors.values()) - 1  # the count of rows is one more


def test_components_say_how_much_they_move_the_output(sequence: Callable[..., StageLoop]) -> None:
    run = sequence("GrowingBank", "queryable", num_stages=1, **BANK, prune_tolerance=0.0)
    run.run()
    module, strategy, bank = run.module, strategy_of(run.module), bank_of(run.module)
    parts = strategy._components(module, run.data[0], "default")
    moved: dict[Any, float] = {}

    def observe(layer: Any, name: str, state: Tensor, routed: Tensor) -> None:
        update = routed.double().flatten(0, -2) @ layer.queryable_B[name].double().T
        moved[layer] = moved.get(layer, 0.0) + update.square().sum().item()

    with bank.observing(observe):
        strategy._loss(module, run.data[0], ["default"])
    for place, layer in bank.layers("default").items():
        matrices = {"A": layer.queryable_A["default"], "B": layer.queryable_B["default"]}
        for part, matrix in matrices.items():
            left, energy, right = parts[f"{place}|{part}"]
            torch.testing.assert_close(left @ right, matrix.double(), rtol=1e-4, atol=1e-6)
            assert (energy.diff() <= 0).all()
        assert parts[f"{place}|B"][1].sum().item() == pytest.approx(moved[layer], rel=1e-4)
        # What a linear S explains of the outputs is at most all of them.
        assert 0 < parts[f"{place}|A"][1].sum().item() <= moved[layer] * (1 + 1e-4)


def test_a_component_of_A_moves_the_output_as_much_as_it_says() -> None:
    torch.manual_seed(0)
    weight_A, weight_B, operator = torch.randn(4, 7).double(), torch.randn(6, 4).double(), torch.randn(4, 4).double()
    inputs = torch.randn(500, 7).double() @ torch.diag(torch.tensor([9, 3, 1, 1, 0.5, 0.1, 0.1])).double()
    state = inputs @ weight_A.T
    left, energy, right = components_of_A(weight_A, weight_B, Moments.of(state, state @ operator.T))
    for kept in (1, 2, 3):
        dropped = inputs @ (weight_A - left[:, :kept] @ right[:kept]).T @ operator.T @ weight_B.T
        assert dropped.square().sum().item() == pytest.approx(energy[kept:].sum().item(), rel=1e-3)


@pytest.mark.parametrize("tolerance", [0.01, 0.2, 1.0])
def test_pruning_keeps_the_loss_within_the_limit(sequence: Callable[..., StageLoop], tolerance: float) -> None:
    run = sequence("GrowingBank", "queryable", num_stages=1, rows=24, **BANK, prune_tolerance=0.0)
    run.run()
    module, strategy, bank = run.module, strategy_of(run.module), bank_of(run.module)
    whole = bank.num_numbers("default")
    limit = strategy._loss(module, run.data[0], ["default"]) * (1 + tolerance)
    kept = strategy._prune(module, run.data[0], "default", limit)
    assert strategy._loss(module, run.data[0], ["default"]) <= limit
    assert 0 <= kept <= 1
    if tolerance == 1.0:
        assert kept < 1 and bank.num_numbers("default") < whole


def test_a_copy_starts_as_the_source_is(sequence: Callable[..., StageLoop]) -> None:
    run = sequence("GrowingBank", "queryable", num_stages=2, **BANK, reuse_margin=0.0)
    run.manifest.finished_stage = 0
    run.begin(1, run.data)
    run._fit(1)
    module, strategy, bank = run.module, strategy_of(run.module), bank_of(run.module)
    # A stage like the first one: its loss under the first one's slice is below the backbone's.
    strategy.start(module, run.data[0], 2)
    strategy.on_train_start(None, module)  # type: ignore[arg-type]
    assert strategy._source == ["default"] and bank.in_use == ["stage02"]
    batch = strategy.collate(module, run.data[0].train_rows[:4])
    module.eval()
    outputs = module.outputs(batch)
    with bank.using(["default"]):
        assert torch.equal(module.outputs(batch), outputs)
    with bank.using([]):
        assert not torch.equal(module.outputs(batch), outputs)


def test_a_stage_that_gains_nothing_shares_its_slice(
    configure: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load(
        configure("GrowingBank", "queryable", 3, 8, **(BANK | {"prune_tolerance": 5.0, "reuse_margin": 0.0}))
    )
    tree["stages"][1]["task"] = tree["stages"][0]["task"]
    run = StageLoop(experiment.parse(yaml.safe_dump(tree), "shared"), tmp_path / "run")
    run.prepare()
    run.run()
    state = bank_json(tmp_path / "run" / "adapters" / "stage-03")
    assert state["stages"]["task1"] == ["default"] and "stage02" not in state["slices"]
    assert not (tmp_path / "run" / "adapters" / "stage-02" / "stage02.safetensors").exists()
    assert "task1: shares default" in capsys.readouterr().out
    stored = json.loads((tmp_path / "run" / "manifest.json").read_text())["stored_parameters"]
    assert stored["2"] - stored["1"] == 2 * 17 + 16 + 1  # its anchors alone


def test_a_stage_like_another_but_for_its_labels_is_reported(
    configure: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = yaml.safe_load(configure("GrowingBank", "queryable", 2, 12, **BANK))
    arguments = tree["stages"][0]["task"]["init_args"]
    for split in ("train", "test"):
        text = Path(arguments[f"{split}_file"]).read_text()
        path = tmp_path / f"other_{split}.csv"
        path.write_text(text.replace(",yes", ",?").replace(",no", ",yes").replace(",?", ",no"))
        tree["stages"][1]["task"]["init_args"][f"{split}_file"] = str(path)
    tree["stages"][1]["task"]["init_args"] |= {"labels": ["yes", "no"], "instruction": arguments["instruction"]}
    run = StageLoop(experiment.parse(yaml.safe_dump(tree), "alike"), tmp_path / "run")
    run.prepare()
    run.run()
    assert "it cannot be told apart from task0" in capsys.readouterr().out
    assert strategy_of(run.module).notes["task1"]["home"] < 0.8


def test_regression_rows_find_home_by_their_numbers(sequence: Callable[..., StageLoop]) -> None:
    run = sequence("GrowingBank", "queryable_regressor", num_stages=2, **BANK)
    run.run()
    notes = strategy_of(run.module).notes
    assert set(notes) == {"task0", "task1"} and all(0 <= note["home"] <= 1 for note in notes.values())
    bank = bank_of(run.module)
    assert bank.gate.scatter_FF.shape[0] == run.module.backbone.num_inputs  # type: ignore[attr-defined]
    loaded = load_bank(run.module.backbone.build(), run.run_dir / "adapters" / "stage-02")
    inputs = GateInputs(loaded)
    batch = strategy_of(run.module).collate(run.module, run.data[1].train_rows[:5])
    x = batch["forward"]["x"]
    keywords = inputs(x, [run.data[1].task.instruction] * 5)
    bank.in_use = None
    run.module.eval()
    with torch.no_grad():
        assert run.module.model is not None
        assert torch.equal(loaded(x=x, **keywords), run.module.model(**batch["forward"]))
