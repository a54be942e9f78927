"""General instructions whose mean encoding is the fixed reference of the instruction prior.

Every encoding of an English instruction points much the same way; what tells tasks apart is what is left once the
common part is taken off. That part has to be known before the first stage and must not move with later ones, so it
comes from these sentences and never from the tasks of a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from continual.backbones import CausalLM, SentenceEncoder

if TYPE_CHECKING:
    from continual.interfaces import AdaptedModule

GENERAL_INSTRUCTIONS = (
    "Answer the question.",
    "Read the text and answer.",
    "Choose the right label for the text.",
    "Translate the sentence.",
    "Write a short summary of the passage.",
    "Solve the problem and give the result.",
    "Explain the steps.",
    "Say whether the statement is true.",
    "Complete the sentence.",
    "Sort the items in the list.",
    "Name the person in the story.",
    "Count how many there are.",
    "Write a reply to the message.",
    "Find the mistake and correct it.",
    "Compare the two and say which one fits better.",
    "Give the value of the function at the point.",
)


class InstructionEncoder:
    """Encodes instructions as the paper's adapter does, for methods that are not that adapter.

    e(text) = mean of the frozen backbone's input embeddings over the text's tokens, or a sentence encoder's vector for
    a backbone without words, less the mean e of GENERAL_INSTRUCTIONS.

    Args:
        module: Holds the backbone, and names the sentence encoder of one without words.
        sentence_encoder: A sentence encoder, by name or folder, to take in the place of a backbone's embeddings.

    Attributes:
        name: The sentence encoder's name or folder; None for the backbone's embeddings.
    """

    def __init__(self, module: AdaptedModule, sentence_encoder: str | None = None) -> None:
        self._module = module
        if sentence_encoder is None and not isinstance(module.backbone, CausalLM):
            sentence_encoder = module.encoder
        self.name = sentence_encoder
        self._sentences = None if sentence_encoder is None else SentenceEncoder(sentence_encoder)
        self._known: dict[str, Tensor] = {}
        self._reference: Tensor | None = None

    def __call__(self, text: str) -> Tensor:
        """Return the encoding of an instruction, (E,), float32 on the CPU; zeros for an empty one."""
        if self._reference is None:
            self._reference = torch.stack([self._raw(general) for general in GENERAL_INSTRUCTIONS]).mean(dim=0)
        if text not in self._known:
            self._known[text] = self._raw(text) - self._reference if text else torch.zeros_like(self._reference)
        return self._known[text]

    @torch.no_grad()
    def _raw(self, text: str) -> Tensor:
        backbone: Any = self._module.backbone
        if self._sentences is not None:
            return self._sentences.encode([text])[0]
        model: Any = self._module.model
        embedding = model.get_input_embeddings()
        embedding = getattr(embedding, "base_layer", embedding)  # an adapted one moves; what it adapts does not
        weight = embedding.weight
        ids = torch.tensor(backbone.encode_instruction(text), device=weight.device)
        return weight[ids].float().cpu().mean(dim=0)  # the same wherever the model lies
