"""The growing bank in a forward pass: rows of several stages in one batch, slices apart, factors, generation."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load, save
from torch import Tensor, nn

from continual.adapters import QueryableLoraConfig
from continual.adapters.growing.bank import SlicedBank
from continual.adapters.growing.gate import StageGate

WORDS = torch.arange(3, 63).view(3, 20)  # each stage's texts are of 20 tokens of its own


def texts(stage: int, num_rows: int, seed: int = 0) -> Tensor:
    """Return token ids of a stage's texts, (num_rows, 9)."""
    generator = torch.Generator().manual_seed(seed)
    return WORDS[stage][torch.randint(0, 20, (num_rows, 9), generator=generator)]


def grow(model: PeftModel, slices: list[list[str]], depth: int = 1, spread: float = 0.3) -> SlicedBank:
    """Put a bank over an adapted model: a stage for each entry, which the slices named in it answer."""
    tuner: Any = model.base_model
    names = list(dict.fromkeys(name for used in slices for name in used))
    for name in names[1:]:
        config: Any = model.peft_config["default"]
        fields = {key: getattr(config, key) for key in ("r", "num_atoms", "top_k", "num_blocks", "target_modules")}
        model.add_adapter(
            name, QueryableLoraConfig(task_type="CAUSAL_LM", frozen_A_seed=config.frozen_A_seed, **fields)
        )
    for name, parameter in model.named_parameters():
        if "queryable_B" in name:
            nn.init.normal_(parameter, std=spread)
    tuner.set_adapter(names or ["default"])
    bank = tuner.growing = SlicedBank(tuner, StageGate(32, 32, length_scale=5.0), depth)
    for stage, used in enumerate(slices):
        features, lengths = bank.features({"text_ids": texts(stage, 300), "row_features": None})
        bank.gate.add(f"task{stage}", features, lengths, torch.zeros(300), torch.zeros(32))
        bank.gate.stages[f"task{stage}"].adapters = used
    bank.in_use = None
    return bank


@pytest.fixture
def grown(backbone: Callable, adapt: Callable) -> Callable[..., tuple[PeftModel, SlicedBank]]:
    """Return a maker of a model with a bank; it takes the stages' slices, a dtype and the adapter's fields."""

    def make(
        slices: list[list[str]], dtype: torch.dtype = torch.float32, **fields: Any
    ) -> tuple[PeftModel, SlicedBank]:
        model = adapt(backbone(dtype=dtype), **fields)
        if dtype is torch.float64:
            model.double()
        return model, grow(model, slices)

    return make


THREE = [["default"], ["stage02"], ["stage03"]]


def mixed() -> tuple[Tensor, Tensor]:
    """Return texts of each stage, one like none and one without text, (5, 9), and prompts, (5, 7)."""
    unlike = torch.full((1, 9), 96)
    rows = torch.cat([*(texts(stage, 1, seed=5) for stage in range(3)), unlike, torch.full((1, 9), -1)])
    return rows, torch.randint(3, 97, (5, 7), generator=torch.Generator().manual_seed(4))


def test_an_empty_bank_is_the_backbone_to_the_bit(backbone, grown, ids) -> None:
    model, bank = grown([])
    expected = backbone()(ids).logits
    assert torch.equal(model(ids, text_ids=texts(0, 3)).logits, expected)
    assert torch.equal(model(ids).logits, expected)
    assert bank.chosen_B is None  # without a text there is nothing to choose by


@pytest.mark.parametrize("slices", [THREE, [["default"], ["stage02", "default"], ["stage03"]]], ids=["own", "read"])
@pytest.mark.parametrize("prior_weight", [0.0, 1.0])
def test_rows_of_all_stages_in_one_batch_are_each_as_alone(grown, slices: list[list[str]], prior_weight: float) -> None:
    model, bank = grown(slices, torch.float64, prior_weight=prior_weight)
    text, prompts = mixed()
    instructions = torch.randint(3, 97, (5, 4), generator=torch.Generator().manual_seed(6)) if prior_weight else None
    asked: dict[str, Any] = {} if instructions is None else {"instruction_ids": instructions}
    with model.base_model.record_routes() as record:
        together = model(prompts, text_ids=text, **asked).logits
        assert bank.chosen_B is not None and bank.chosen_B.tolist() == [0, 1, 2, -1, -1]
        for row, names in enumerate([*slices, [], []]):
            one = slice(row, row + 1)
            given = {name: tensor[one] for name, tensor in asked.items()}
            alone = model(prompts[one], text_ids=text[one], **given).logits
            torch.testing.assert_close(alone, together[one], rtol=0, atol=1e-11)
            with bank.using(names):
                torch.testing.assert_close(model(prompts[one], **given).logits, together[one], rtol=0, atol=1e-11)
            for name in {name for own in slices for name in own}:
                for block, routes in enumerate(record[0][name]):
                    expected = record[-1][name][block] if name in names else torch.zeros(1, 7, 6, dtype=routes.dtype)
                    torch.testing.assert_close(routes[one], expected, rtol=0, atol=1e-11)
    assert (together - model(prompts).logits).abs().amax(dim=(1, 2))[:3].min() > 1e-3  # the slices do something


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_rows_of_all_stages_may_have_adapters_of_another_precision(grown, dtypes: tuple[torch.dtype, ...]) -> None:
    model, bank = grown(THREE, dtypes[0])
    model.to(dtypes[0])
    for name, parameter in model.named_parameters():
        if "queryable" in name:
            parameter.data = parameter.data.to(dtypes[1])
    text, prompts = mixed()
    together = model(prompts, text_ids=text).logits
    assert together.dtype is dtypes[0]
    bare = model(prompts).logits
    for row, name in enumerate(["default", "stage02", "stage03"]):
        with bank.using([name]):
            alone = model(prompts[row : row + 1]).logits[0]
        apart, moved = (alone - together[row]).abs().mean(), (alone - bare[row]).abs().mean()
        assert apart < 0.05 * moved, f"{name}: {apart} apart, where the slice moves by {moved}"


def test_padding_of_the_text_changes_no_choice_and_no_feature(grown) -> None:
    _, bank = grown(THREE)
    text = texts(1, 4, seed=6)
    padded = torch.cat([text, torch.full((4, 6), -1)], dim=1)
    (alone, short), (beside, long) = (bank.features({"text_ids": t, "row_features": None}) for t in (text, padded))
    torch.testing.assert_close(alone, beside)
    assert torch.equal(short, long)


@pytest.mark.parametrize("in_batch", [True, False])
def test_a_row_that_goes_nowhere_is_the_backbone_to_the_bit(backbone, grown, in_batch: bool) -> None:
    model, bank = grown(THREE)
    text, prompts = mixed()
    rows = slice(0, 5) if in_batch else slice(3, 5)
    answer = model(prompts[rows], text_ids=text[rows]).logits
    assert bank.chosen_B is not None and bank.chosen_B.tolist()[-2:] == [-1, -1]
    assert torch.equal(answer[-2:], backbone()(prompts[rows]).logits[-2:])


def test_features_are_the_bare_backbones(backbone, grown) -> None:
    _, bank = grown(THREE)
    text = texts(2, 4)
    hidden = backbone()(text, output_hidden_states=True).hidden_states[1].detach()
    states = hidden / hidden.square().mean(dim=-1, keepdim=True).sqrt()
    features, lengths = bank.features({"text_ids": text, "row_features": None})
    torch.testing.assert_close(features, states[:, 1:].mean(dim=1), rtol=1e-4, atol=1e-4)
    assert lengths.tolist() == [9] * 4


def test_a_texts_features_are_computed_once_however_it_is_padded(grown, monkeypatch) -> None:
    model, bank = grown(THREE)
    text, prompts = mixed()
    computed, features = [], bank.features
    monkeypatch.setattr(bank, "features", lambda rows: computed.append(len(rows["text_ids"])) or features(rows))
    first = model(prompts[:3], text_ids=text[:3]).logits
    assert computed == [3]
    padded = torch.cat([text, torch.full((5, 4), -1)], dim=1)
    again = model(prompts, text_ids=padded).logits  # two rows are new
    assert computed == [3, 2]
    torch.testing.assert_close(again[:3], first)
    assert torch.equal(bank.chosen_B, bank.gate.choose(*features({"text_ids": text, "row_features": None})))
    monkeypatch.setattr("continual.adapters.growing.bank._MOST_READ", 6)
    model(prompts[:2].flip(0), text_ids=texts(0, 2, seed=11))  # no room: what was kept goes
    assert computed == [3, 2, 2] and len(bank._read) == 2


def test_routes_of_every_token_sum_to_one_over_nothing_and_all_atoms(grown) -> None:
    model, bank = grown([["default"], ["default", "stage02"], ["stage03"]])
    text, prompts = mixed()
    with model.base_model.record_routes() as record:
        model(prompts, text_ids=text)
    joined = bank.join(record[0], (5, 7))
    assert len(joined) == 2 and all(routes.shape == (5, 7, 1 + 3 * 6) for routes in joined)
    for routes in joined:
        torch.testing.assert_close(routes.sum(dim=-1), torch.ones(5, 7))
        assert routes.min() >= 0
        nothing = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0])
        torch.testing.assert_close(routes[:, 0, 0], nothing)
        share = routes[:, :, 1:].unflatten(-1, (3, 6)).sum(dim=-1)[:, 0]
        expected = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]])
        torch.testing.assert_close(share, expected)
    with bank.using(["stage02"]), model.base_model.record_routes() as record:
        model(prompts)
        joined = bank.join(record[0], (5, 7))
    for routes in joined:
        torch.testing.assert_close(routes[..., 7:13].sum(dim=-1), torch.ones(5, 7))


def test_another_slice_leaves_what_the_first_answers(grown) -> None:
    model, bank = grown([["default"]])
    text, prompts = texts(0, 4, seed=7), mixed()[1][:4]
    before, kept = model(prompts, text_ids=text).logits, {k: v.clone() for k, v in bank.tensors("default").items()}
    config: Any = QueryableLoraConfig(task_type="CAUSAL_LM", r=4, num_atoms=6, top_k=2, num_blocks=2)
    model.add_adapter("stage02", config)
    model.base_model.set_adapter(["default", "stage02"])
    bank.train_only("stage02")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    own = {name for name, _ in model.named_parameters() if "queryable" in name and "stage02" in name}
    assert trainable == own and own
    with bank.using(["default", "stage02"]):  # as where the new slice reads the first
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(prompts, labels=prompts).loss.backward()
            optimizer.step()
    assert all(torch.equal(kept[name], tensor) for name, tensor in bank.tensors("default").items())
    features, lengths = bank.features({"text_ids": texts(1, 300), "row_features": None})
    bank.gate.add("task1", features, lengths, torch.zeros(300), torch.zeros(32))
    bank.gate.stages["task1"].adapters = ["default", "stage02"]
    again = model(prompts, text_ids=text).logits
    assert bank.chosen_B is not None and bank.chosen_B.tolist() == [0] * 4
    assert torch.equal(again, before)


def test_the_same_tensors_are_sent_anew_once_a_stage_is_gone(grown) -> None:
    model, bank = grown(THREE)
    text, prompts = texts(1, 4, seed=7), mixed()[1][:4]
    model(prompts, text_ids=text)
    assert bank.chosen_B is not None and bank.chosen_B.tolist() == [1] * 4
    bank.gate.drop("task0")
    with bank.using(["stage02"]):
        expected = model(prompts).logits
    assert torch.equal(model(prompts, text_ids=text).logits, expected)
    assert bank.chosen_B.tolist() == [0] * 4


def test_a_slice_comes_back_from_its_tensors_to_the_bit(grown, ids) -> None:
    model, bank = grown([["default"], ["stage02"]], frozen_A_seed=3)
    factors = {}
    for place, layer in list(bank.layers("stage02").items())[:3]:
        factors[f"{place}|B"] = (torch.randn(layer.out_features, 2), torch.randn(2, 4))
    bank.factor("stage02", factors)
    tensors = load(save({name: tensor.contiguous() for name, tensor in bank.tensors("stage02").items()}))
    assert not [name for name in tensors if name.endswith("|A")]  # drawn again from the seed
    assert sum(name.endswith("|own") for name in tensors) == 3
    assert bank.num_numbers("stage02") == sum(tensor.numel() for tensor in tensors.values())
    other, restored = grown([["default"], ["stage02"]], frozen_A_seed=3)
    restored.restore("stage02", tensors)
    with bank.using(["stage02"]), restored.using(["stage02"]):
        assert torch.equal(other(ids).logits, model(ids).logits)
    again = restored.tensors("stage02")
    assert set(again) == set(tensors) and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_a_slice_with_a_part_missing_is_refused_by_its_name(grown) -> None:
    _, bank = grown([["default"], ["stage02"]], frozen_A_seed=3)
    place, layer = next(iter(bank.layers("stage02").items()))
    bank.factor("stage02", {f"{place}|B": (torch.randn(layer.out_features, 2), torch.randn(2, 4))})
    tensors = bank.tensors("stage02")
    del tensors[f"{place}|B|mix"]
    with pytest.raises(ValueError, match=rf"{re.escape(place)}\|B\|mix missing"):
        bank.restore("stage02", tensors)


def test_a_copy_computes_what_its_source_does(grown, ids) -> None:
    model, bank = grown([["default"], ["stage02"]])
    with bank.using(["default"]):
        expected = model(ids).logits
    with bank.using(["stage02"]):
        assert not torch.equal(model(ids).logits, expected)
        bank.copy("default", "stage02")
        assert torch.equal(model(ids).logits, expected)


def test_an_observer_sees_what_stands_before_b(grown, ids) -> None:
    model, bank = grown([["default"], ["stage02"]])
    seen: list[tuple[nn.Module, str, Tensor, Tensor]] = []
    with bank.observing(lambda *found: seen.append(found)), bank.using(["stage02"]):
        model(ids)
    layers = bank.layers("stage02")
    assert len(seen) == len(layers) and {id(layer) for layer, *_ in seen} == {id(m) for m in layers.values()}
    assert all(name == "stage02" and routed.shape == (3, 11, 4) for _, name, _, routed in seen)
    assert all(state.shape == routed.shape and not torch.equal(state, routed) for *_, state, routed in seen)
    model(ids)
    assert len(seen) == len(layers)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generation_with_a_cache_is_that_without(grown, num_beams: int) -> None:
    model, bank = grown(THREE, torch.float64)
    text, prompts = mixed()
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": num_beams}
    cached = model.generate(input_ids=prompts, text_ids=text, use_cache=True, **options)
    assert torch.equal(model.generate(input_ids=prompts, text_ids=text, use_cache=False, **options), cached)
    for row in range(5):
        one = slice(row, row + 1)
        assert torch.equal(model.generate(input_ids=prompts[one], text_ids=text[one], **options)[0], cached[row])
    assert len({tuple(row) for row in cached[:, 7:].tolist()}) > 1


def test_checkpointing_gives_every_slice_the_same_gradients(grown) -> None:
    """Rows of several stages in one batch, and a pass over other rows before the backward pass recomputes."""
    found = []
    for checkpointed in (False, True):
        model, _ = grown([["default"], ["default", "stage02"], ["stage03"]])
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        rows, ids = mixed()
        losses = [
            model(ids.roll(turn, 0), text_ids=rows.roll(3 * turn, 0), labels=ids, use_cache=False).loss
            for turn in (0, 1)
        ]
        (losses[0] + 2 * losses[1]).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert {name.split(".")[-1] for name in found[0] if "queryable_B" in name} == {"default", "stage02", "stage03"}
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())
