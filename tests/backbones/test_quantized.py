"""Backbones in 4 bits: what is loaded, what a quantised layer computes, what is counted, and what is refused."""

import logging
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, GgufConfig, PreTrainedModel

from continual.backbones import CausalLM, TinyCausalLM
from continual.backbones.quantized import num_weights
from continual.config import experiment
from continual.errors import ConfigError
from continual.runtime.quiet import quieten

NF4: dict[str, Any] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "float32",
}


@pytest.fixture
def nf4() -> BitsAndBytesConfig:
    """QLoRA's own format, computed in float32; skips where bitsandbytes is not installed."""
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(**NF4)


def packed(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


def weight_of(model: nn.Module, name: str) -> Tensor:
    return cast(Tensor, model.get_submodule(name).weight)


def input_gradients(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits, and the gradient that reaches the embeddings through all the layers."""
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    logits.pow(2).mean().backward()
    return logits.detach(), embedded.grad  # type: ignore[return-value]


def test_linear_layers_are_packed_and_the_rest_is_not(nf4: BitsAndBytesConfig) -> None:
    plain, model = TinyCausalLM(hidden_size=64).build(), TinyCausalLM(hidden_size=64, quantization=nf4).build()
    layers = packed(model)
    assert len(layers) == 4 * 7 and not any("lm_head" in name or "embed" in name for name in layers)
    assert {layer.weight.element_size() * layer.weight.numel() for layer in layers.values()} == {
        64 * 64 // 2, 64 * 32 // 2, 64 * 128 // 2
    }  # fmt: skip
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)  # type: ignore[arg-type]
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert sum(map(num_weights, model.parameters())) == sum(p.numel() for p in plain.parameters())
    for name, layer in layers.items():
        original, restored = weight_of(plain, name), dequantize_bnb_weight(layer.weight)
        assert restored.shape == original.shape
        assert 0 < (restored - original).norm() < 0.12 * original.norm()  # NF4 keeps a normal weight to about a tenth


def test_scoring_changes_neither_weights_nor_gradients(nf4: BitsAndBytesConfig) -> None:
    """Some CPUs are given weights that are packed anew, rounded once more, and pass no gradients from then on."""
    model, ids = TinyCausalLM(hidden_size=64, quantization=nf4).build(), torch.randint(3, 97, (2, 9))
    restored = TinyCausalLM(hidden_size=64).build()
    for name, layer in packed(model).items():
        weight_of(restored, name).data = dequantize_bnb_weight(layer.weight)
    expected = input_gradients(restored, ids)
    for found, value in zip(input_gradients(model.train(), ids), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(ids).logits, expected[0], rtol=1e-5, atol=1e-6)
    for found, value in zip(input_gradients(model.train(), ids), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)


def test_a_folder_is_quantised_or_was_so_already(nf4: BitsAndBytesConfig, tmp_path: Path) -> None:
    ids, folder = torch.arange(20)[None], tmp_path / "plain"
    TinyCausalLM(hidden_size=64).build().save_pretrained(folder)
    backbone = CausalLM(str(folder), dtype="float32", quantization=nf4)
    assert backbone.name == "plain, nf4"
    first, again = backbone.build(), backbone.build()
    with torch.inference_mode():
        assert torch.equal(first(ids).logits, again(ids).logits)
        first.save_pretrained(tmp_path / "packed")
        stored = CausalLM(str(tmp_path / "packed"), dtype="float32").build()
        assert len(packed(stored)) == 28
        assert torch.equal(stored(ids).logits, first(ids).logits)
    with pytest.raises(ConfigError, match="is stored quantised already: leave quantization out$"):
        CausalLM(str(tmp_path / "packed"), quantization=nf4).build()


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        (GgufConfig(dequantize=True), "quantization: GgufConfig is not for here: a GGUF file is unpacked"),
        (BitsAndBytesConfig(), "BitsAndBytesConfig quantises nothing so: set load_in_4bit or load_in_8bit"),
    ],
)
def test_what_transformers_would_pass_over_is_refused(quantization: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TinyCausalLM(quantization=quantization).build()
    assert "\n" not in str(caught.value)


def test_layers_without_gradients_are_refused(nf4: BitsAndBytesConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    monkeypatch.setattr(Bnb4BitHfQuantizer, "is_trainable", False)
    with pytest.raises(ConfigError, match="as nf4: no adapter can be trained over layers quantised so$"):
        TinyCausalLM(hidden_size=64, quantization=nf4).build()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator computes them rightly")
def test_widths_that_a_cpu_gets_wrong_are_refused(nf4: BitsAndBytesConfig) -> None:
    with pytest.raises(ConfigError, match=r"self_attn\.q_proj has 96 inputs, which is no multiple of 64"):
        TinyCausalLM(hidden_size=96, quantization=nf4).build()


def test_without_the_package_one_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ConfigError, match="cannot load the model 'tiny-random'.*pip install -U bitsandbytes") as caught:
        TinyCausalLM(quantization=BitsAndBytesConfig(**NF4)).build()
    assert "\n" not in str(caught.value)


def test_a_configuration_names_it_and_round_trips() -> None:
    given = {"class_path": "transformers.BitsAndBytesConfig", "init_args": NF4}
    tree = Path(__file__).parents[2].joinpath("configs/smoke.yaml").read_text()
    parsed = experiment.parse(tree, "tiny", [f"model.backbone.init_args.quantization={given}"])
    backbone: Any = parsed.model.backbone
    assert backbone.quantization.quantization_method() == "nf4"
    assert backbone.name == "tiny-random, nf4"
    assert experiment.parse(parsed.resolved, "tiny").resolved == parsed.resolved


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"class_path": "transformers.BitsAndBytesConfig", "init_args": {"load_in_4bits": True}},
            "unknown key 'load_in_4bits' in BitsAndBytesConfig; did you mean load_in_4bit",
        ),
        (
            {"class_path": "transformers.BitsAndBytesConfig", "init_args": NF4 | {"load_in_8bit": True}},
            "load_in_4bit and load_in_8bit are both True, but only one can be used at the same time",
        ),
        ({"class_path": "transformers.LlamaConfig"}, "LlamaConfig does not correspond to a subclass"),
    ],
)
def test_a_wrong_configuration_is_one_line(given: dict[str, Any], message: str) -> None:
    tree = Path(__file__).parents[2].joinpath("configs/smoke.yaml").read_text()
    with pytest.raises(ConfigError, match=message) as caught:
        experiment.parse(tree, "tiny", [f"model.backbone.init_args.quantization={given}"])
    assert "\n" not in str(caught.value) and "Union" not in str(caught.value), str(caught.value)


def test_a_run_does_not_repeat_what_bitsandbytes_asks_for() -> None:
    """On some CPUs it says at every import that another package would make it faster."""
    quieten()
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)
