"""Gradient norms against autograd by hand, their concentration, and a loss that stops being a number."""

from __future__ import annotations

import copy
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contexts import context
from peft import LilyConfig, LoraConfig, VBLoRAConfig

from continual.callbacks import GradientRecorder
from continual.callbacks.gradients import layer_of
from continual.data.batch import IGNORED
from continual.errors import RunError
from continual.storage.records import SCHEMAS

KEYS = {"run": "r", "seed": 3, "stage": 1, "task": "one"}


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight", "model.layers.3"),
        ("base_model.model.model.layers.13.mlp.up_proj.queryable_B.default", "model.layers.13"),
        ("base_model.model.model.layers.0.self_attn.q_proj.vblora_logits_A.default", "model.layers.0"),
        ("base_model.model.transformer.h.2.mlp.c_fc.lora_B.default.weight", "transformer.h.2"),
        ("base_model.model.model.decoder.layers.4.fc1.lora_A.default.weight", "model.decoder.layers.4"),
        ("base_model.model.layers.1.linear.lora_A.default.weight", "layers.1"),
        ("base_model.model.head.lora_A.default.weight", "head"),
        ("base_model.model.head.queryable_A.default", "head"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head"),
        ("base_model.queryable_bank.default.atoms", "bank"),
        ("base_model.vblora_vector_bank.default", "bank"),
        ("prompt_encoder.default.embedding.weight", "bank"),
    ],
)
def test_layer_of(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def by_hand(module: Any, batch: dict[str, Any]) -> dict[str, tuple[float, int]]:
    """Return layer -> (norm, tensors) of one batch's gradients, from a copy of the module."""
    module = copy.deepcopy(module)
    module.train()
    module.loss(batch, module.outputs(batch)).backward()
    squares, counts = defaultdict(float), defaultdict(int)
    for name, parameter in module.model.named_parameters():
        if parameter.requires_grad:
            parts = name.split(".")
            layer = next((f"{a}.{b}" for a, b in zip(parts, parts[1:], strict=False) if b.isdigit()), None)
            if "bank" in name:
                layer = "bank"
            elif layer is None:
                layer = "head"
            elif "mlp" not in name and "self_attn" in name:
                layer = f"model.{layer}"
            squares[layer] += 0.0 if parameter.grad is None else float(parameter.grad.double().square().sum())
            counts[layer] += 1
    return {layer: (square**0.5, counts[layer]) for layer, square in squares.items()}


def values(recorder: GradientRecorder, metric: str, step: int) -> dict[str, float]:
    return {row["layer"]: row["value"] for row in recorder.rows if (row["metric"], row["step"]) == (metric, step)}


@pytest.mark.parametrize("kind", ["lora", "queryable", "vblora", "regression"])
def test_norms_before_clipping_equal_autograd_by_hand(kind: str, make_module, make_data, make_trainer) -> None:
    adapters: dict[str, Any] = {
        "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
        "vblora": VBLoRAConfig(r=2, num_vectors=8, vector_length=8, topk=2, target_modules=["q_proj", "v_proj"]),
    }
    task = "regression" if kind == "regression" else "causal_lm"
    module = make_module(task, adapters.get(kind))
    data = make_data(module, "regression" if kind == "regression" else "labels", num_rows=8, batch_size=8)
    (batch,) = data.train_dataloader()
    expected = by_hand(module, batch)
    assert ("bank" in expected) == (kind != "lora")
    assert ("head" in expected) == (kind == "regression")
    recorder = GradientRecorder()
    recorder.begin(context(seed=3))
    make_trainer(recorder, max_epochs=1, gradient_clip_val=1e-6).fit(module, datamodule=data)
    norms = values(recorder, "grad_norm", 1)
    assert norms == pytest.approx({layer: norm for layer, (norm, _) in expected.items()}, rel=1e-4)
    counts = {row["layer"]: row["count"] for row in recorder.rows if row["metric"] == "grad_norm"}
    assert counts == {layer: count for layer, (_, count) in expected.items()}
    own = [norm for layer, (norm, _) in expected.items() if layer != "bank"]
    assert len(own) >= 4
    concentration = values(recorder, "grad_concentration", 1)[""]
    assert concentration == pytest.approx(max(own) / (sum(own) / len(own)), rel=1e-4)
    assert 1 <= concentration <= len(own)


def test_norms_and_concentration_worked_by_hand() -> None:
    """Layers of A and B: (3, 4), (6, 8), (5, 12), (0, 0) have norms 5, 10, 13, 0; 13 over 7. The bank is no layer."""
    recorder = GradientRecorder()
    recorder.begin(context(seed=3))
    recorder._layers = ["0", "bank", "1", "2", "3"]
    recorder._index, recorder._own = torch.tensor([0, 0, 1, 2, 2, 3, 3, 4, 4]), torch.tensor([1, 0, 1, 1, 1]).bool()
    norms = torch.tensor([3.0, 4.0, 99.0, 6.0, 8.0, 5.0, 12.0, 0.0, 0.0])
    recorder._pending = [(1, 0, torch.tensor(0.5), norms)]
    recorder._settle()
    assert values(recorder, "grad_norm", 1) == {"0": 5.0, "bank": 99.0, "1": 10.0, "2": 13.0, "3": 0.0}
    assert values(recorder, "grad_concentration", 1)[""] == pytest.approx(1.857143, abs=1e-6)


def test_what_layers_share_is_the_bank_wherever_it_hangs(make_module, make_data, make_trainer) -> None:
    # Lily hangs one B into several layers.
    module = make_module(adapter=LilyConfig(r=2, stride_A=1, num_B=2, target_modules=["q_proj"]))
    data = make_data(module, num_rows=4, batch_size=4)
    recorder = GradientRecorder()
    recorder.begin(context(seed=3))
    make_trainer(recorder, max_epochs=1).fit(module, datamodule=data)
    counts = {row["layer"]: row["count"] for row in recorder.rows if row["metric"] == "grad_norm"}
    assert counts == {"bank": 1} | {f"model.layers.{index}": 2 for index in range(4)}


def test_rows_of_a_stage(make_module, make_data, make_trainer) -> None:
    module = make_module()
    data = make_data(module, num_rows=12, batch_size=4)
    recorder = GradientRecorder(interval=4)
    recorder.begin(context(seed=3))
    make_trainer(recorder, max_epochs=3).fit(module, datamodule=data)
    losses = [row for row in recorder.rows if row["metric"] == "train_loss"]
    assert [(row["step"], row["epoch"]) for row in losses] == [(step, (step - 1) // 3) for step in range(1, 10)]
    assert {row["direction"] for row in losses} == {"lower"}
    assert {row["step"] for row in recorder.rows if row["metric"] == "grad_norm"} == {1, 4, 8}
    assert [row["step"] for row in recorder.rows if row["metric"] == "grad_concentration"] == list(range(1, 10))
    assert all(set(row) == set(SCHEMAS["gradients"].names) for row in recorder.rows)
    assert all(row["task"] == "one" for row in recorder.rows)


def test_the_loss_is_the_one_that_was_computed(make_module, make_data, make_trainer) -> None:
    module = make_module()
    data = make_data(module, num_rows=4, batch_size=4)
    (batch,) = data.train_dataloader()
    expected = module.train().loss(batch, module.outputs(batch)).item()
    recorder = GradientRecorder()
    recorder.begin(context(seed=3))
    make_trainer(recorder, max_epochs=1).fit(module, datamodule=data)
    assert values(recorder, "train_loss", 1)[""] == pytest.approx(expected, rel=1e-5)


def test_a_step_of_several_batches_has_the_mean_over_their_tokens(make_module, make_data, make_trainer) -> None:
    module = make_module(spread=0.0)
    data = make_data(module, num_rows=12, batch_size=2)
    losses: list[tuple[float, int]] = []
    loss = module.loss

    def noted(batch: dict[str, Any], outputs: torch.Tensor) -> torch.Tensor:
        losses.append((loss(batch, outputs).item(), int((batch["labels"] != IGNORED).sum())))
        return loss(batch, outputs)

    module.loss = noted
    recorder = GradientRecorder()
    recorder.begin(context(seed=3))
    make_trainer(recorder, max_epochs=1, accumulate_grad_batches=3).fit(module, datamodule=data)
    rows = [row for row in recorder.rows if row["metric"] == "train_loss"]
    assert [row["step"] for row in rows] == [1, 2]
    assert len({count for _, count in losses}) > 1
    means = [
        sum(value * count for value, count in own) / sum(count for _, count in own) for own in (losses[:3], losses[3:])
    ]
    assert [row["value"] for row in rows] == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_names_stage_and_step(bad: float, make_module, make_data, make_trainer) -> None:
    module = make_module()
    data = make_data(module, num_rows=12, batch_size=2)
    loss, calls = module.loss, []
    module.loss = lambda *given: (calls.append(1), loss(*given) * (bad if len(calls) == 3 else 1))[1]
    recorder = GradientRecorder()
    recorder.begin(context(seed=3))
    with pytest.raises(
        RunError, match=rf"^stage 'one', step 3: the loss is not finite \({bad}\); the stage is dropped$"
    ):
        make_trainer(recorder, max_epochs=1).fit(module, datamodule=data)
    assert len(calls) == 3
    assert [row["step"] for row in recorder.rows if row["metric"] == "train_loss"] == [1, 2]


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on a GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Return the device it claims."""
        return torch.device("cuda")


@pytest.mark.parametrize("bad_step", [None, 5, 20])
def test_on_a_gpu_losses_wait_and_the_first_bad_one_is_named(bad_step: int | None) -> None:
    recorder: Any = GradientRecorder(interval=5)
    recorder.begin(context(seed=3))
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    module: Any = SimpleNamespace(
        device=torch.device("cpu"),
        named_parameters=lambda **_: [("model.base_model.model.layers.0.linear.lora_A.default.weight", weight)],
    )
    trainer: Any = SimpleNamespace(current_epoch=0, accumulate_grad_batches=1)

    def train() -> None:
        recorder.on_train_start(trainer, module)
        for step in range(1, 22):
            trainer.global_step = step
            recorder.on_before_optimizer_step(trainer, module, None)
            value = torch.tensor(float("nan") if bad_step and step >= bad_step else float(step))
            recorder.on_train_batch_end(trainer, module, {"loss": value.as_subclass(Elsewhere)}, None, step - 1)
            assert len({row["step"] for row in recorder.rows}) == (0 if step < 16 else 16)
        recorder.on_train_end(trainer, module)

    if bad_step is None:
        train()
    else:
        with pytest.raises(RunError, match=rf"^stage 'one', step {bad_step}: the loss is not finite \(nan\)"):
            train()
    losses = [row["value"] for row in recorder.rows if row["metric"] == "train_loss"]
    assert losses == [float(step) for step in range(1, bad_step or 22)]
    assert {row["value"] for row in recorder.rows if row["metric"] == "grad_norm"} <= {5.0}
