"""Gradients and numerics: activation checkpointing, torch.compile, autocast and low-precision backbones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from continual.adapters import QueryableLoraConfig
from continual.adapters.queryable.carrier import RouteCarrier
from continual.adapters.queryable.layer import QueryableLinear
from continual.adapters.queryable.model import QueryableLoraModel
from continual.adapters.queryable.router import AtomBank, BlockState, SharedState, routed_operator


def gradients(model: PeftModel, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Run a forward pass for every batch, THEN one backward pass; return the gradient of every trained parameter."""
    model.train()
    model.zero_grad()
    torch.manual_seed(3)
    losses = [model(**batch, use_cache=False).logits.float().pow(2).mean() for batch in batches]
    torch.stack([(1 + 2 * i) * loss for i, loss in enumerate(losses)]).sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    return {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}


def checkpoint(model: PeftModel, use_reentrant: bool = False) -> PeftModel:
    """Switch activation checkpointing on, as a user does."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})  # type: ignore[operator]
    model.enable_input_require_grads()  # type: ignore[operator]
    return model


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 0) -> None:
    """Compare gradients parameter by parameter."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.fixture
def batches(ids, instructions) -> list[dict[str, Tensor]]:
    """Two batches that route differently, one of another length."""
    other = (ids + 31) % 90 + 3
    return [{"input_ids": ids, "instruction_ids": instructions}, {"input_ids": other[:2, :8]}]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("count", [1, 2])
def test_checkpointing_gives_the_same_gradients(backbone, adapt, batches, kind: str, count: int) -> None:
    model = adapt(backbone(kind), num_blocks=3, lora_dropout=0.2)
    expected = gradients(model, batches[:count])
    assert all(g.abs().max() > 0 for n, g in expected.items() if "prior" not in n)
    assert_same(gradients(checkpoint(copy.deepcopy(model)), batches[:count]), expected)


def test_one_state_on_the_layers_would_give_wrong_gradients(backbone, adapt, batches, monkeypatch) -> None:
    """The control: were the state kept on the layers between passes, the test above would fail."""
    model = adapt(backbone(), num_blocks=3)
    batches[1] = {"input_ids": (batches[0]["input_ids"] + 31) % 90 + 3}  # of the same shape, or recomputing raises
    expected = gradients(model, batches)
    monkeypatch.setattr(RouteCarrier, "receive", lambda self, attention, args, kwargs: (args, drop(kwargs)))
    monkeypatch.setattr(QueryableLoraModel, "_end_pass", lambda *args: None)
    begin = QueryableLoraModel._begin_pass

    def keep(self: Any, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        args, kwargs = begin(self, module, args, kwargs)
        RouteCarrier(self._adapted).give(kwargs["routing_state"])
        return args, kwargs

    def drop(kwargs: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in kwargs.items() if name != "routing_state"}

    monkeypatch.setattr(QueryableLoraModel, "_begin_pass", keep)
    broken = checkpoint(adapt(backbone(), num_blocks=3))
    broken.load_state_dict(model.state_dict())
    wrong = gradients(broken, batches)
    assert max((wrong[n] - g).abs().max().item() for n, g in expected.items()) > 1e-4


def test_reentrant_checkpointing_is_refused(backbone, adapt, ids) -> None:
    model = checkpoint(adapt(backbone()), use_reentrant=True).train()
    with pytest.raises(ValueError, match="use_reentrant': False"):
        model(ids)
    model.eval()(ids)  # nothing is checkpointed outside of training


def test_checkpointing_a_model_whose_layers_take_no_keywords_is_refused(plain_model, adapt) -> None:
    backbone = plain_model()
    backbone.gradient_checkpointing = True
    with pytest.raises(ValueError, match="the layers of PlainModel take no keywords"):
        adapt(backbone).train()(torch.randn(2, 6))


def test_copies_and_deletes_after_a_checkpointed_backward(backbone, adapt, batches) -> None:
    model = checkpoint(adapt(backbone()))
    gradients(model, batches)
    clone = copy.deepcopy(model)
    assert all(m.routing_state is None for m in clone.modules() if isinstance(m, QueryableLinear))
    assert_same(gradients(clone, batches), gradients(model, batches))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(backbone, adapt, ids, instructions, training: bool) -> None:
    torch._dynamo.reset()
    model = adapt(backbone(num_hidden_layers=2)).train(training)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    kwargs = {"input_ids": ids, "instruction_ids": instructions, "use_cache": False}
    expected, out = model(**kwargs).logits, compiled(**kwargs).logits
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    if training:
        expected.pow(2).mean().backward()
        out.pow(2).mean().backward()
        compiled_grads = {n.replace("_orig_mod.", ""): p.grad for n, p in compiled.named_parameters()}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(compiled_grads[name], parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_k", [2, 6])
def test_autocast_trains_and_stays_near_float32(backbone, adapt, ids, instructions, top_k: int) -> None:
    model = adapt(backbone(), top_k=top_k, spread=0.05).train()
    expected = model(ids, instruction_ids=instructions).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(ids, instruction_ids=instructions, labels=ids)
    assert (out.logits.float() - expected).abs().mean() < 0.1 * expected.abs().mean()
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_routes_take_a_softmax_of_higher_precision_than_the_logits(monkeypatch) -> None:
    """On a GPU, autocast gives bfloat16 logits and a float32 softmax."""
    bank = AtomBank(QueryableLoraConfig(r=4, num_atoms=6, top_k=2, prior_weight=0), 0)
    softmax = Tensor.softmax
    monkeypatch.setattr(Tensor, "softmax", lambda self, dim: softmax(self, dim, dtype=torch.float32))
    assert bank._weights(torch.randn(2, 3, 6, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_bfloat16_backbone_gets_a_float32_adapter(backbone, adapt, ids, instructions, kind: str) -> None:
    model = adapt(backbone(kind, torch.bfloat16)).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    out = model(ids, instruction_ids=instructions, labels=ids)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())


def routed(route: Tensor, u: Tensor, atoms: Tensor) -> Tensor:
    """Return S u of three projections and a bank with these atoms; lora_alpha / r is in them."""
    bank = AtomBank(QueryableLoraConfig(prior_weight=0), 0)
    block = BlockState(SharedState(atoms, None), [], None, None, operator=routed_operator(route, atoms))
    return bank.apply_route(block, u)


@pytest.mark.parametrize(
    "wanted", [(True, True, True), (True, False, True), (False, True, False), (False, False, True)]
)
def test_the_banks_product_has_the_gradients_of_its_definition(wanted: tuple[bool, bool, bool]) -> None:
    shapes = [(5, 3), (5, 3, 2), (3, 2, 2)]
    given = [torch.rand(s, dtype=torch.float64, requires_grad=w) for s, w in zip(shapes, wanted, strict=True)]
    route, u, atoms = given
    torch.testing.assert_close(routed(*given), torch.einsum("nm,mij,ngj->ngi", route, atoms, u))
    assert torch.autograd.gradcheck(routed, given)


def test_the_banks_product_keeps_nothing_larger_than_an_operator_a_token() -> None:
    shapes = [(50, 8), (50, 3, 4), (8, 4, 4)]
    route, u, atoms = (torch.rand(shape, requires_grad=True) for shape in shapes)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        routed(route, u, atoms)
    assert sorted(kept) == sorted([route.numel(), u.numel(), atoms.numel(), 50 * 4 * 4])
