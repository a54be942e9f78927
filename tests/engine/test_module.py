"""The LightningModule: what trains, by which loss and rate, and what is saved and loaded."""

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, VeraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from continual.adapters import QueryableLoraConfig
from continual.backbones import MLPRegressor, TinyCausalLM
from continual.data.batch import Row
from continual.data.collate import Collator
from continual.data.stage_data import StageData
from continual.errors import ConfigError, RunError
from continual.training.module import ContinualModule
from tasks import RegressionTask, TextTask

ROWS = [
    ("Sort.", "Is red warm?", "warm"),
    ("Count the letters of this.", "a", "one"),
    ("", "Why so long a question?", "no"),
]


def make(**arguments: Any) -> ContinualModule:
    """A module on a random model of two layers, its adapter moved off its start so that everything has a gradient."""
    config = QueryableLoraConfig(
        r=2, num_atoms=4, top_k=2, num_blocks=2, prior_dim=4, target_modules=["q_proj", "v_proj"]
    )
    chosen: dict[str, Any] = {"adapter": config} | arguments
    module = ContinualModule(TinyCausalLM(num_layers=2), **chosen)
    module.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def encoded(module: ContinualModule) -> list[Row]:
    backbone: Any = module.backbone
    return [
        Row(
            {"row": i},
            instruction,
            backbone.encode_prompt(instruction, "", question, 100)[0],
            backbone.encode_answer(answer),
        )
        for i, (instruction, question, answer) in enumerate(ROWS)
    ]


def collate(module: ContinualModule, rows: list[Row]) -> dict[str, Any]:
    return Collator(module.backbone, module.uses_instructions, answers=True)(rows)


def loss_of(module: ContinualModule, batch: dict[str, Any]) -> torch.Tensor:
    return module.loss(batch, module.outputs(batch))


@pytest.fixture(scope="module")
def module() -> ContinualModule:
    torch.manual_seed(0)
    return make()


@pytest.fixture
def data(tables: Path) -> StageData:
    return StageData(
        TextTask(
            folder=str(tables),
            train_file="animals.train.parquet",
            test_file="animals.test.parquet",
            labels=["bird", "fish"],
        ),
        batch_size=4,
    )


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_padding_on_the_right_changes_nothing(module: ContinualModule) -> None:
    """The loss of a batch is the mean over its answers' tokens, whichever rows they stand beside."""
    rows = encoded(module)
    assert len({row.length for row in rows}) == len({len(row.prompt_ids) for row in rows}) == len(rows)
    alone = [loss_of(module, collate(module, [row])) * len(row.answer_ids) for row in rows]
    expected = torch.stack(alone).sum() / sum(len(row.answer_ids) for row in rows)
    torch.testing.assert_close(loss_of(module, collate(module, rows)), expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_a_padded_batch_are_those_of_its_rows(module: ContinualModule) -> None:
    rows = encoded(module)
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    total = sum(len(row.answer_ids) for row in rows)
    alone = torch.stack([loss_of(module, collate(module, [row])) * len(row.answer_ids) / total for row in rows]).sum()
    expected = torch.autograd.grad(alone, trainable, allow_unused=True)
    together = torch.autograd.grad(loss_of(module, collate(module, rows)), trainable, allow_unused=True)
    assert any(gradient is not None and gradient.abs().max() > 0 for gradient in expected)
    torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-6)


def test_each_answer_token_is_predicted_by_the_one_before(module: ContinualModule) -> None:
    """By hand: full logits, shifted by one, at the places of the answers' tokens alone."""
    rows = encoded(module)
    batch = collate(module, rows)
    assert module.model is not None
    logits = module.model(**batch["forward"]).logits.log_softmax(dim=-1)
    terms = [
        -logits[i, len(row.prompt_ids) + t - 1, token]
        for i, row in enumerate(rows)
        for t, token in enumerate(row.answer_ids)
    ]
    torch.testing.assert_close(loss_of(module, batch), torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)


def test_only_the_columns_from_the_first_answer_on_go_through_the_head(module: ContinualModule) -> None:
    rows, seen = encoded(module), []
    batch = collate(module, rows)
    assert module.model is not None
    head = module.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, args, output: seen.append(output.shape[1]))  # type: ignore[union-attr]
    loss_of(module, batch)
    hook.remove()  # type: ignore[union-attr]
    first, width = min(len(row.prompt_ids) for row in rows), max(row.length for row in rows)
    assert batch["labels"].shape == (len(rows), width - first)
    assert seen == [width - first + 1]


def test_the_loss_of_a_regression_is_the_mean_squared_error() -> None:
    module = ContinualModule(MLPRegressor(hidden_size=8, num_layers=2), LoraConfig(r=2, target_modules=["linear"]))
    module.configure_model()
    batch = {"forward": {"x": torch.randn(5, 10)}, "labels": torch.randn(5)}
    assert module.model is not None
    expected = (module.model(x=batch["forward"]["x"]) - batch["labels"]).square().mean()  # type: ignore[index]
    torch.testing.assert_close(loss_of(module, batch), expected)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    def gradients(checkpointing: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = make(gradient_checkpointing=checkpointing)
        assert module.model is not None and module.model.is_gradient_checkpointing == checkpointing
        first, second = (loss_of(module, collate(module, rows)) for rows in (encoded(module), encoded(module)[:1]))
        (first + second).backward()  # two forwards before one backward
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain and set(plain) == set(checkpointed)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


# -- what trains ------------------------------------------------------------------------------------------------------


def test_exactly_the_adapter_trains() -> None:
    module = ContinualModule(TinyCausalLM(num_layers=2), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    module.configure_model()
    prefix = "model.base_model.model.model.layers"
    expected = {
        f"{prefix}.{layer}.{place}.lora_{side}.default.weight"
        for layer in (0, 1)
        for place in ("self_attn.q_proj", "mlp.down_proj")
        for side in "AB"
    }
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    assert set(trainable) == expected
    counts = module.parameter_counts()
    assert counts["trainable_parameters"] == sum(p.numel() for p in trainable.values())
    assert counts["total_parameters"] == sum(p.numel() for p in module.parameters())


def test_exactly_our_adapter_trains(module: ContinualModule) -> None:
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    layers = {f"model.base_model.model.model.layers.{i}.self_attn.{q}" for i in (0, 1) for q in ("q_proj", "v_proj")}
    own = {f"{layer}.queryable_{side}.default" for layer in layers for side in "AB"}
    bank = {name for name in trainable if name.startswith("model.base_model.queryable_bank.default.")}
    assert own <= trainable and trainable == own | bank and bank


def test_the_width_of_the_layers_is_the_language_models(module: ContinualModule) -> None:
    assert module.hidden_width == 32
    regressor = ContinualModule(MLPRegressor(num_inputs=4), LoraConfig(target_modules=["head"]))
    regressor.configure_model()
    assert regressor.hidden_width == 0


def test_building_twice_does_nothing(module: ContinualModule) -> None:
    before = module.model
    module.configure_model()
    assert module.model is before


def test_an_adapter_that_does_not_fit_is_a_configuration_error() -> None:
    for config in (QueryableLoraConfig(target_modules=["q_proj", "qq_proj"]), LoraConfig(target_modules=["qq_proj"])):
        with pytest.raises(ConfigError, match=r"^model\.adapter: .*qq_proj"):
            ContinualModule(TinyCausalLM(), config).configure_model()


def test_the_instruction_reference_is_fixed_before_the_first_stage(module: ContinualModule) -> None:
    assert module.tuner is not None
    bank: Any = module.tuner.queryable_bank["default"]
    assert bank.instruction_reference.abs().sum() > 0 and not bank.instruction_reference.requires_grad


# -- the schedule and the trainer -------------------------------------------------------------------------------------


class Rates(L.Callback):
    """Keeps the learning rate that each step is taken with."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def fit(
    module: ContinualModule, data: StageData, max_epochs: int = 1, **arguments: Any
) -> tuple[L.Trainer, list[float]]:
    rates = Rates()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=max_epochs, logger=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, **{"enable_checkpointing": False, "callbacks": [rates]} | arguments,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return trainer, rates.rates


def test_the_rate_warms_up_and_falls_to_its_last_share(data: StageData) -> None:
    module = make(
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0), warmup_steps=3, final_lr_fraction=0.2
    )
    trainer, rates = fit(module, data, max_epochs=4)
    steps = 4 * data.num_batches
    assert trainer.global_step == len(rates) == steps
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[3:] == pytest.approx([1.0 - 0.8 * k / (steps - 3) for k in range(steps - 3)])
    optimizer = trainer.optimizers[0]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_a_short_stage_spends_half_of_it_warming_up_at_most(data: StageData) -> None:
    module = make(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0), warmup_steps=1000)
    _, rates = fit(module, data)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == data.num_batches // 2


def test_a_fresh_trainer_trains_the_second_stage(tables: Path) -> None:
    module = make()
    for name, labels in (("animals", ["bird", "fish"]), ("colours", ["warm", "cold"])):
        before = {n: p.clone() for n, p in module.named_parameters() if p.requires_grad}
        task = TextTask(folder=str(tables), train_file=f"{name}.train.parquet", labels=labels)
        trainer, _ = fit(module, StageData(task, batch_size=4))
        assert trainer.global_step > 0
        assert any(not torch.equal(p, before[n]) for n, p in module.named_parameters() if p.requires_grad)
        assert all(p.requires_grad for n, p in module.named_parameters() if n in before)


def test_the_frozen_weights_stay_as_they_were(data: StageData) -> None:
    module = make()
    before = {n: t.clone() for n, t in module.named_parameters() if not t.requires_grad}
    fit(module, data)
    assert all(torch.equal(t, before[n]) for n, t in module.named_parameters() if n in before)


def test_nothing_to_train_is_an_error(data: StageData) -> None:
    module = make()
    module.requires_grad_(False)
    with pytest.raises(RunError, match="no trainable parameters"):
        fit(module, data)


def test_a_checkpoint_holds_no_backbone(data: StageData, tmp_path: Path) -> None:
    module = make()
    trainer, _ = fit(module, data, enable_checkpointing=True, default_root_dir=str(tmp_path), callbacks=[])
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    state = torch.load(tmp_path / "own.ckpt", weights_only=True)["state_dict"]
    assert {name for name, p in module.named_parameters() if p.requires_grad} <= set(state)
    assert all("queryable" in name for name in state)
    other = make()
    other.load_state_dict(state, strict=other.strict_loading)
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in state.items())


# -- saving and loading -----------------------------------------------------------------------------------------------


def losses(module: ContinualModule) -> Tensor:
    return torch.stack([loss_of(module, collate(module, [row])) for row in encoded(module)])


@pytest.mark.parametrize(
    "config", [None, LoraConfig(r=2, target_modules=["q_proj"]), VeraConfig(r=4, target_modules=["q_proj"])],
    ids=["ours", "LoRA", "VeRA"],
)  # fmt: skip
def test_a_saved_adapter_is_loaded_exactly(tmp_path: Path, config: Any) -> None:
    arguments = {} if config is None else {"adapter": config}
    module = make(**arguments)
    module.save_adapter(tmp_path / "stage-01")
    torch.manual_seed(5)
    other = make(**arguments)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    assert not torch.equal(losses(other), losses(module))
    other.load_adapter(tmp_path / "stage-01")
    assert torch.equal(losses(other), losses(module))
    started = make(**arguments, start_from=str(tmp_path / "stage-01"))
    with torch.no_grad():  # make moves the adapter; go back to what was loaded
        started.load_adapter(tmp_path / "stage-01")
    assert torch.equal(losses(started), losses(module))


def test_a_saved_configuration_does_not_follow_the_hash_seed(tmp_path: Path) -> None:
    """PEFT keeps target_modules as a set, whose order is another one in every process."""
    targets = ["v_proj", "up_proj", "k_proj", "down_proj", "q_proj", "gate_proj", "o_proj"]
    module = make(adapter=LoraConfig(r=2, target_modules=targets))
    module.save_adapter(tmp_path / "stage-01")
    saved = json.loads((tmp_path / "stage-01" / "adapter_config.json").read_text())
    assert saved["target_modules"] == sorted(targets)


def test_start_from_is_where_the_adapter_starts(tmp_path: Path) -> None:
    module = make()
    module.save_adapter(tmp_path / "start")
    started = ContinualModule(TinyCausalLM(num_layers=2), module.adapter, start_from=str(tmp_path / "start"))
    started.configure_model()
    assert torch.equal(losses(started), losses(module))
    with pytest.raises(ConfigError, match=r"^model\.start_from: .*nowhere"):
        ContinualModule(TinyCausalLM(), module.adapter, start_from=str(tmp_path / "nowhere")).configure_model()


def test_a_missing_tensor_is_named(module: ContinualModule, tmp_path: Path) -> None:
    module.save_adapter(tmp_path / "stage-01")
    path = tmp_path / "stage-01" / "adapter_model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        save_file({key: value for key, value in tensors.items() if key != name}, path)
        with pytest.raises(RunError, match=r"stage-01/adapter_model\.safetensors lacks 1 tensors"):
            module.load_adapter(tmp_path / "stage-01")


@pytest.mark.parametrize("crash", ["save_pretrained", "replace"])
def test_an_adapter_is_saved_whole_or_not_at_all(
    module: ContinualModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    def fail(*arguments: Any, **keywords: Any) -> None:
        if crash == "save_pretrained":  # half of the folder is written
            Path(arguments[0]).mkdir(exist_ok=True)
            (Path(arguments[0]) / "adapter_config.json").write_text("{")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(module.model if crash == "save_pretrained" else os, crash, fail)
        with pytest.raises(OSError, match="disk full"):
            module.save_adapter(tmp_path / "stage-01")
    assert not (tmp_path / "stage-01").exists()
    module.save_adapter(tmp_path / "stage-01")
    assert {path.name for path in tmp_path.iterdir()} == {"stage-01"}
    module.load_adapter(tmp_path / "stage-01")
    assert (tmp_path / "stage-01" / "adapter_model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_regression_task_scores_by_its_squared_error(tmp_path: Path) -> None:
    module = ContinualModule(MLPRegressor(hidden_size=8, num_layers=2), LoraConfig(r=2, target_modules=["linear"]))
    data = StageData(RegressionTask("friedman", train_rows=16, test_rows=8), batch_size=4)
    fit(module, data)
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=str(tmp_path))
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    assert module.model is not None
    rows = data._encoded["test"].rows
    x, y = torch.tensor([r.source["x"] for r in rows]), torch.tensor([r.source["y"] for r in rows])
    with torch.no_grad():
        assert metrics["squared_error"] == pytest.approx(F.mse_loss(module.model(x=x), y).item(), rel=1e-4)


@pytest.mark.parametrize(
    "values, words", [({"warmup_steps": -1}, "warmup_steps"), ({"final_lr_fraction": 1.5}, "final_lr_fraction")]
)
def test_values_out_of_range_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"model.{words}"):
        ContinualModule(TinyCausalLM(), LoraConfig(), **values)
