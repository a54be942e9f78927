"""Generation: instructions as a keyword, cached as uncached, left padding, beams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor


def generate(model: PeftModel, ids: Tensor, **kwargs: Any) -> Tensor:
    """Generate six tokens without sampling."""
    return model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, **kwargs)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("num_beams", [1, 2])
def test_cached_equals_uncached(backbone, adapt, ids, instructions, kind: str, num_beams: int) -> None:
    model = adapt(backbone(kind, torch.float64))
    options: dict[str, Any] = {"instruction_ids": instructions, "num_beams": num_beams}
    cached = generate(model, ids, use_cache=True, **options)
    assert cached.shape == (3, 17)
    assert torch.equal(generate(model, ids, use_cache=False, **options), cached)
    if num_beams == 1:  # ... and both equal one full pass for each token
        sequence = ids
        for _ in range(6):
            best = model(sequence, instruction_ids=instructions).logits[:, -1].argmax(dim=-1)
            sequence = torch.cat([sequence, best[:, None]], dim=1)
        assert torch.equal(sequence, cached)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_left_padded_rows_are_generated_as_alone(backbone, adapt, ids, instructions, num_beams: int) -> None:
    model = adapt(backbone(dtype=torch.float64))
    lengths = [11, 8, 5]
    padded, mask = ids.clone(), torch.ones_like(ids)
    for row, length in enumerate(lengths):
        padded[row, : 11 - length], mask[row, : 11 - length] = 0, 0
    together = generate(model, padded, attention_mask=mask, instruction_ids=instructions, num_beams=num_beams)
    for row, length in enumerate(lengths):
        prompt = ids[row : row + 1, 11 - length :]
        alone = generate(model, prompt, instruction_ids=instructions[row : row + 1], num_beams=num_beams)
        assert torch.equal(together[row, 11:], alone[0, length:])


def test_the_instruction_reaches_every_step(backbone, adapt, ids) -> None:
    model = adapt(backbone(), spread=0.5, prior_weight=5.0)
    rows = ids[:1].expand(12, -1)
    instructions = torch.arange(4, 88, 7)[:, None]
    with model.base_model.record_routes() as record:
        generated = generate(model, rows, instruction_ids=instructions)
    assert len(record) == 6
    assert len({tuple(row.tolist()) for row in generated}) > 1
    # One row an instruction: the routes of every step differ between instructions.
    assert all((entry["default"][0] - entry["default"][0][:1]).abs().amax() > 1e-3 for entry in record)
    encodings = model.base_model.encode_instruction(instructions)
    assert torch.equal(generate(model, rows, instruction_encoding=encodings), generated)


def test_an_unknown_keyword_is_still_refused(backbone, adapt, ids) -> None:
    with pytest.raises(ValueError, match="instruction_idz"):
        generate(adapt(backbone()), ids, instruction_idz=ids)


def test_training_by_embeddings_needs_no_ids(backbone, adapt, ids, instructions) -> None:
    model = adapt(backbone())
    vectors = model.get_input_embeddings()(ids)
    by_vectors = model(inputs_embeds=vectors, instruction_ids=instructions).logits
    assert torch.equal(by_vectors, model(ids, instruction_ids=instructions).logits)
