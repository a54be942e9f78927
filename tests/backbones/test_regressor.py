"""The MLP regressor: seeded, frozen, and open to PEFT by its layers' names."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from continual.backbones import MLPRegressor


def test_shape_name_and_freezing() -> None:
    backbone = MLPRegressor(num_inputs=8, hidden_size=16, num_layers=3)
    module = backbone.build()
    assert backbone.name == "MLP-3x16"
    assert module(torch.randn(5, 8)).shape == (5,)
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert [name for name, _ in module.named_parameters() if "weight" in name] == [
        "layers.0.linear.weight",
        "layers.1.linear.weight",
        "layers.2.linear.weight",
        "head.weight",
    ]


def test_weights_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first = MLPRegressor(seed=3).build().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, other = MLPRegressor(seed=3).build().state_dict(), MLPRegressor(seed=4).build().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_a_rows_scale_survives_depth() -> None:
    hidden = torch.randn(2000, 10)
    for layer in MLPRegressor(num_layers=8).build().layers:
        hidden = layer(hidden)
        assert 0.5 < hidden.std() < 2.0


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [(["linear", "head"], 5), (["layers.0.linear", "layers.3.linear"], 2), (r"layers\.[12]\.linear", 2)],
)
def test_lora_goes_in_and_learns(targets: list[str] | str, adapted: int) -> None:
    model = get_peft_model(MLPRegressor().build(), LoraConfig(r=4, target_modules=targets))  # type: ignore[arg-type]
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * adapted
    assert all("lora_" in name for name, _ in trainable)

    x = torch.randn(256, 10)
    y = torch.sin(x[:, 0]) + 0.5 * x[:, 1]
    optimizer = torch.optim.AdamW([parameter for _, parameter in trainable], lr=1e-2)
    losses = []
    for _ in range(60):
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
