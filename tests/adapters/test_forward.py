"""The forward pass: against an independent reference with plain loops, at its start, and against plain LoRA."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from continual.adapters.queryable.layer import QueryableLinear


def rms_norm(values: list[float]) -> list[float]:
    """Divide by the root of the mean square (plus 1e-6)."""
    root = math.sqrt(sum(v * v for v in values) / len(values) + 1e-6)
    return [v / root for v in values]


def softmax(values: list[float]) -> list[float]:
    """Return exp(v) / sum exp(v)."""
    top = max(values)
    powers = [math.exp(v - top) for v in values]
    return [p / sum(powers) for p in powers]


def dot(a: list[float], b: list[float]) -> float:
    """Return the scalar product."""
    return sum(x * y for x, y in zip(a, b, strict=True))


class Reference:
    """The method of arXiv 2605.08423 as one reads it, for ONE token of a ``PlainModel`` with its adapter."""

    def __init__(self, model: PeftModel, encoding: list[float] | None) -> None:
        self.tensors = {name: t.tolist() for name, t in model.state_dict().items()}
        self.config: Any = model.peft_config["default"]
        self.num_layers = len(model.get_base_model().layers)  # type: ignore[arg-type]
        self.states: list[list[float]] = []
        self.alpha: list[float] = []
        self.prior = self.log_prior(encoding)

    def bank(self, name: str) -> Any:
        """Return a tensor of the bank as nested lists."""
        return self.tensors[f"base_model.queryable_bank.default.{name}"]

    def log_prior(self, encoding: list[float] | None) -> list[float]:
        """Return lambda log pi_m(c) of every atom."""
        if encoding is None:
            return [self.config.prior_weight * -math.log(self.config.num_atoms)] * self.config.num_atoms
        centred = [e - r for e, r in zip(encoding, self.bank("instruction_reference"), strict=True)]
        length = math.sqrt(dot(centred, centred))
        projected = [dot(row, [c / length for c in centred]) for row in self.bank("prior_map")]
        scores = [dot(projected, key) / self.config.prior_temperature for key in self.bank("prior_keys")]
        return [self.config.prior_weight * math.log(p) for p in softmax(scores)]

    def route(self, u: list[float], block: int) -> list[float]:
        """Return alpha_bm of every atom at the state u."""
        z = rms_norm(u)
        summary = [0.0] * len(z)
        if block > 0:
            query_vector = self.bank("summary_queries")[block - 1]
            for weight, earlier in zip(softmax([dot(query_vector, s) for s in self.states]), self.states, strict=True):
                summary = [s + weight * e for s, e in zip(summary, earlier, strict=True)]
        self.states.append(z)
        query_input = z + summary if self.config.num_blocks > 1 else z  # one block has no earlier states
        query = [dot(row, query_input) for row in self.bank("query_maps")[block]]
        logits = [dot(query, k) / math.sqrt(len(query)) + p for k, p in zip(self.bank("keys"), self.prior, strict=True)]
        kept = sorted(range(len(logits)), key=lambda m: -logits[m])[: self.config.top_k]
        weights = softmax([logits[m] for m in kept])
        return [weights[kept.index(m)] if m in kept else 0.0 for m in range(len(logits))]

    def projection(self, name: str, h: list[float]) -> list[float]:
        """Return W h + bias + (lora_alpha / r) B S A h; the first projection of a block routes."""
        layer, short = int(name.split(".")[1]), name.split(".")[2]
        prefix = f"base_model.model.{name}"
        u = [dot(row, h) for row in self.tensors[f"{prefix}.queryable_A.default"]]
        block = layer * self.config.num_blocks // self.num_layers
        is_new_block = layer == 0 or (layer - 1) * self.config.num_blocks // self.num_layers != block
        if short == "up" and is_new_block:
            self.alpha = self.route(u, block)
        routed = [0.0] * len(u)
        for weight, atom in zip(self.alpha, self.bank("atoms"), strict=True):
            routed = [s + weight * dot(row, u) for s, row in zip(routed, atom, strict=True)]
        weight, bias = self.tensors[f"{prefix}.base_layer.weight"], self.tensors[f"{prefix}.base_layer.bias"]
        out_rows = self.tensors[f"{prefix}.queryable_B.default"]
        scale = self.config.lora_alpha / self.config.r
        return [dot(w, h) + b + scale * dot(o, routed) for w, b, o in zip(weight, bias, out_rows, strict=True)]

    def __call__(self, h: list[float]) -> list[float]:
        for layer in range(self.num_layers):
            inner = [math.tanh(v) for v in self.projection(f"layers.{layer}.up", h)]
            h = [a + b for a, b in zip(h, self.projection(f"layers.{layer}.down", inner), strict=True)]
        head = zip(
            self.tensors["base_model.model.head.weight"], self.tensors["base_model.model.head.bias"], strict=True
        )
        return [dot(w, h) + b for w, b in head]


@pytest.mark.parametrize("num_blocks", [1, 3, 5])
@pytest.mark.parametrize("top_k", [2, 5])
def test_agrees_with_a_reference_of_plain_loops(plain_model, adapt, num_blocks: int, top_k: int) -> None:
    model = adapt(
        plain_model(torch.float64), spread=0.5, r=3, num_atoms=5, top_k=top_k, num_blocks=num_blocks, key_dim=4,
        lora_alpha=5, prior_weight=0.7, prior_temperature=0.5, prior_dim=3, use_depth_summary=num_blocks > 1,
    )  # fmt: skip
    encodings = torch.randn(2, 5, dtype=torch.float64).float().double()
    model.base_model.set_instruction_reference(torch.randn(4, 5).double())
    encodings[1] = 0  # the second row has no instruction
    h = torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad():
        out = model(h, instruction_encoding=encodings)
    for row in range(2):
        given = encodings[row].tolist() if row == 0 else None
        for token in range(3):
            expected = torch.tensor(Reference(model, given)(h[row, token].tolist()), dtype=torch.float64)
            # Encodings are centred in float32; without one, everything is in float64.
            torch.testing.assert_close(out[row, token], expected, rtol=0, atol=1e-6 if row == 0 else 1e-12)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_starts_as_the_backbone_bit_for_bit(backbone, adapt, ids, instructions, kind: str, dtype: torch.dtype) -> None:
    expected = backbone(kind, dtype)(ids).logits
    model = adapt(backbone(kind, dtype), spread=0)
    assert torch.equal(model(ids, instruction_ids=instructions).logits, expected)
    assert torch.equal(model(ids).logits, expected)


def test_plain_model_starts_as_the_backbone_and_takes_rows_without_tokens(plain_model, adapt) -> None:
    x = torch.randn(7, 6)
    assert torch.equal(adapt(plain_model(), spread=0)(x), plain_model()(x))
    model = adapt(plain_model())
    encodings = torch.randn(7, 5)
    out = model(x, instruction_encoding=encodings)
    assert out.shape == (7, 2)
    assert not torch.allclose(out, model(x))
    alone = torch.cat([model(x[i : i + 1], instruction_encoding=encodings[i : i + 1]) for i in range(7)])
    torch.testing.assert_close(alone, out, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_is_plain_lora_with_equal_keys_and_identity_atoms(backbone, adapt, ids, kind: str) -> None:
    model = adapt(backbone(kind, torch.float64), top_k=6, prior_weight=0, init_atoms="identity", lora_alpha=7)
    bank = model.base_model.queryable_bank["default"]
    with torch.no_grad():
        bank.keys.copy_(bank.keys[:1].expand_as(bank.keys))
    targets = model.peft_config["default"].target_modules
    lora = get_peft_model(
        backbone(kind, torch.float64),
        LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=7, target_modules=targets, fan_in_fan_out=kind == "gpt2"),
    )
    ours = {n.removesuffix(".default"): p for n, p in model.named_parameters()}
    pairs = []
    for name, parameter in lora.named_parameters():
        if "lora_" in name:
            pairs.append((ours[name.removesuffix(".default.weight").replace("lora_", "queryable_")], parameter))
            parameter.data.copy_(pairs[-1][0].data)
    out, expected = model(ids, labels=ids), lora.eval()(ids, labels=ids)
    torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=1e-12)
    out.loss.backward()
    expected.loss.backward()
    for mine, theirs in pairs:
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-12)


def test_trainable_parameters_are_exactly_the_adapter(backbone, adapt) -> None:
    model = adapt(backbone(num_hidden_layers=2), target_modules=["q_proj"])
    layers = [f"base_model.model.model.layers.{i}.self_attn.q_proj.queryable_{x}.default" for i in (0, 1) for x in "AB"]
    names = ("atoms", "keys", "prior_keys", "prior_map", "query_maps", "summary_queries")
    bank = [f"base_model.queryable_bank.default.{name}" for name in names]
    assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == sorted(layers + bank)


def test_each_block_routes_once_by_its_first_projection(backbone, adapt, ids) -> None:
    model = adapt(backbone(), num_blocks=3)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QueryableLinear)}
    leads = [n.removeprefix("base_model.model.model.") for n, m in layers.items() if "default" in m.leads]
    assert leads == ["layers.0.self_attn.q_proj", "layers.2.self_attn.q_proj", "layers.3.self_attn.q_proj"]
    with model.base_model.record_routes() as record:
        model(ids)
    assert [tuple(r.shape) for r in record[0]["default"]] == [(3, 11, 6)] * 3


def test_nested_recorders_both_record(backbone, adapt, ids) -> None:
    model = adapt(backbone())
    with model.base_model.record_routes() as outer:
        with model.base_model.record_routes() as inner:
            model(ids)
        model(ids)
    model(ids)
    assert (len(outer), len(inner)) == (2, 1)


def test_state_is_cleared_after_a_forward_that_raises(backbone, adapt, ids, instructions) -> None:
    model = adapt(backbone())
    expected = model(ids, instruction_ids=instructions).logits
    with pytest.raises(ValueError, match="instructions for 2 rows were given with a batch of 3 rows"):
        model(ids, instruction_ids=instructions[:2])
    assert all(m.routing_state is None for m in model.modules() if isinstance(m, QueryableLinear))
    assert torch.equal(model(ids, instruction_ids=instructions).logits, expected)


def test_a_call_around_the_model_says_so(backbone, adapt, ids) -> None:
    model = adapt(backbone())
    with pytest.raises(RuntimeError, match="call the model that the adapter was put into"):
        model.get_base_model().model(ids)


def test_instruction_encodings_of_the_wrong_width_are_named(plain_model, adapt) -> None:
    with pytest.raises(ValueError, match=r"shape \(7, 4\), but this adapter takes \(rows, 5\)"):
        adapt(plain_model())(torch.randn(7, 6), instruction_encoding=torch.randn(7, 4))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_copy_is_independent_of_the_original(backbone, adapt, ids, instructions, kind: str) -> None:
    model = adapt(backbone(kind))
    before = model(ids, instruction_ids=instructions).logits
    clone = copy.deepcopy(model)
    assert torch.equal(clone(ids, instruction_ids=instructions).logits, before)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(input_ids=ids, instruction_ids=instructions, **options)
    assert torch.equal(clone.generate(input_ids=ids, instruction_ids=instructions, **options), expected)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
        clone(ids, instruction_ids=instructions)
    assert torch.equal(model(ids, instruction_ids=instructions).logits, before)
    # The copy's hooks are the copy's: taking them off leaves the original whole, and the other way round.
    second = copy.deepcopy(model)
    second.unload()
    assert torch.equal(model(ids, instruction_ids=instructions).logits, before)
    third = copy.deepcopy(model)
    model.unload()
    assert torch.equal(third(ids, instruction_ids=instructions).logits, before)


def test_a_recorder_takes_as_many_passes_as_it_wants(backbone, adapt, ids) -> None:
    model = adapt(backbone())
    with model.base_model.record_routes(most=1) as first, model.base_model.record_routes() as every:
        model(ids)
        model(ids.flip(0))
    assert (len(first), len(every)) == (1, 2)
    assert all(torch.equal(one, other) for one, other in zip(first[0]["default"], every[0]["default"], strict=True))
