"""How text goes into a causal language model and comes out: layout, cutting, answers, chat turns."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from continual.backbones import CausalLM, TinyCausalLM
from continual.errors import ConfigError

TINY = TinyCausalLM()
"""A byte is a token, so lengths in these tests are lengths in UTF-8."""

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def as_text(backbone: CausalLM, ids: list[int]) -> str:
    return backbone.tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("instruction", "context", "question", "expected"),
    [
        ("Say yes.", "Rain fell.", "Wet?", "Say yes.\nRain fell.\nWet?\nAnswer:"),
        ("", "Rain fell.", "Wet?", "Rain fell.\nWet?\nAnswer:"),
        ("Say yes.", "", "Wet?", "Say yes.\nWet?\nAnswer:"),
        ("Say yes.", "Rain fell.", "", "Say yes.\nRain fell.\nAnswer:"),
        ("", "", "Wet?", "Wet?\nAnswer:"),
        ("Say yes.", "", "", "Say yes.\nAnswer:"),
    ],
)
def test_plain_layout(instruction: str, context: str, question: str, expected: str) -> None:
    ids, num_cut = TINY.encode_prompt(instruction, context, question, 100)
    assert as_text(TINY, ids) == expected
    assert num_cut == 0


def test_a_long_prompt_loses_the_end_of_its_context() -> None:
    ids, num_cut = TINY.encode_prompt("Say yes.", "Rain fell all day.", "Wet?", 31)
    assert as_text(TINY, ids) == "Say yes.\nRain fell\nWet?\nAnswer:"
    assert num_cut == len(" all day.")


@given(instruction=TEXT, context=st.text(max_size=80), question=TEXT, max_tokens=st.integers(0, 120))
def test_only_the_context_is_cut(instruction: str, context: str, question: str, max_tokens: int) -> None:
    whole, none_cut = TINY.encode_prompt(instruction, context, question, 10_000)
    assert none_cut == 0
    context_length = len(context.encode())
    fixed_length = len(whole) - context_length
    if max_tokens < fixed_length:
        with pytest.raises(ConfigError, match=f"take {fixed_length} tokens"):
            TINY.encode_prompt(instruction, context, question, max_tokens)
        return
    ids, num_cut = TINY.encode_prompt(instruction, context, question, max_tokens)
    assert len(ids) == min(len(whole), max_tokens) == len(whole) - num_cut
    start = len(TINY.encode_prompt(instruction, "", "", 10_000)[0]) - len("\nAnswer:") + bool(instruction)
    kept = context_length - num_cut
    if context:
        assert ids == whole[: start + kept] + whole[start + context_length :]
    else:
        assert ids == whole


@given(TEXT)
def test_an_answer_comes_back_as_it_went_in(text: str) -> None:
    for backbone in (TINY, TinyCausalLM(prompt_format="chat")):
        ids = backbone.encode_answer(text)
        assert ids[-1] == backbone.tokenizer.eos_token_id
        assert backbone.decode([*ids, 60, 61]) == text.strip()


def test_special_tokens_in_text_are_only_text() -> None:
    end = TINY.tokenizer.eos_token_id
    assert end not in TINY.encode_prompt("", "<|im_end|>", "<|im_end|>", 100)[0]
    assert TINY.encode_answer("<|im_end|>").count(end) == 1
    assert TINY.decode(TINY.encode_answer("<|im_end|>")) == "<|im_end|>"


def test_instruction_ids() -> None:
    assert as_text(TINY, TINY.encode_instruction("Say yes.")) == "Say yes."
    assert TINY.encode_instruction("") == []


def test_chat_is_one_user_turn() -> None:
    backbone = TinyCausalLM(prompt_format="chat")
    turn = "<|im_start|>user\nSay yes.\n{}\nWet?<|im_end|>\n<|im_start|>assistant\n"
    ids, num_cut = backbone.encode_prompt("Say yes.", "Rain fell all day.", "Wet?", 100)
    assert (as_text(backbone, ids), num_cut) == (turn.format("Rain fell all day."), 0)
    ids, num_cut = backbone.encode_prompt("Say yes.", "Rain fell all day.", "Wet?", len(ids) - 9)
    assert (as_text(backbone, ids), num_cut) == (turn.format("Rain fell"), 9)


TEMPLATES = {
    "default system prompt": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}",
    "start mark first": "<|pad|>",
}


@pytest.mark.parametrize("start", TEMPLATES)
def test_chat_leaves_a_default_system_prompt_out_but_keeps_a_start_mark(start: str) -> None:
    backbone = TinyCausalLM(prompt_format="chat")
    backbone.tokenizer.chat_template = TEMPLATES[start] + backbone.tokenizer.chat_template
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    if start == "start mark first":
        backbone.tokenizer.bos_token = "<|pad|>"
        expected = "<|pad|>" + expected
    assert as_text(backbone, backbone.encode_prompt("", "", "Hi", 100)[0]) == expected


def test_chat_keeps_a_template_that_cannot_be_continued_as_it_is() -> None:
    backbone = TinyCausalLM(prompt_format="chat")
    backbone.tokenizer.chat_template = "{{ messages | length }}:{{ messages[-1].content }}!"
    assert as_text(backbone, backbone.encode_prompt("", "", "Hi", 100)[0]) == "1:Hi!"


def test_chat_without_a_template_is_refused() -> None:
    backbone = TinyCausalLM(prompt_format="chat")
    backbone.tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template, use 'plain'"):
        backbone.encode_prompt("", "", "Hi", 100)


def test_a_tokenizer_without_padding_pads_with_its_end_mark(tiny_lm_dir: Path, tmp_path: Path) -> None:
    backbone = CausalLM(str(tiny_lm_dir))
    tokenizer = backbone.tokenizer
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((tiny_lm_dir / "config.json").read_bytes())
    assert CausalLM(str(tmp_path)).tokenizer.pad_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no end-of-text token"):
        _ = CausalLM(str(tmp_path)).tokenizer


def test_a_text_that_comes_again_is_tokenised_once_and_is_nobodys_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, asked = TinyCausalLM(), []
    tokenizer = backbone.tokenizer

    def counting(text: str, **options: bool) -> dict[str, list[int]]:
        asked.append(text)
        return tokenizer(text, **options)

    monkeypatch.setitem(backbone.__dict__, "tokenizer", counting)
    first = backbone.encode_instruction("Say yes.")
    first.append(7)
    assert backbone.encode_instruction("Say yes.") == tokenizer("Say yes.")["input_ids"]
    assert asked == ["Say yes."]
    texts = [f"row {index}" for index in range(3000)]
    assert [backbone.encode_text(text) for text in texts] == [tokenizer(text)["input_ids"] for text in texts]
    assert len(backbone._known) <= 1000  # memory does not grow with the rows
    backbone.encode_text("long " * 200)
    assert all(len(text) < 500 for text in backbone._known)
