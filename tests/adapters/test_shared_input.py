"""Projections of one input are computed together: the same as each by itself, and nothing is left of it."""

from __future__ import annotations

import copy
from typing import Any, cast

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from continual.adapters import QueryableLoraConfig
from continual.adapters.queryable.layer import QueryableLinear
from continual.adapters.queryable.router import AtomBank

NUM_TOKENS = 5


def layers_of(model: nn.Module) -> list[QueryableLinear]:
    """Return the adapted layers."""
    return [module for module in model.modules() if isinstance(module, QueryableLinear)]


def apart(model: Any) -> Any:
    """Return a copy of a model in which every projection computes for itself."""
    clone = copy.deepcopy(model)
    for index, layer in enumerate(layers_of(clone)):
        layer.reads = str(index)
    return clone


def trained(model: Any) -> Any:
    """Give a model's adapter values that change what it computes."""
    generator = torch.Generator().manual_seed(3)
    for layer in layers_of(model):
        nn.init.normal_(layer.queryable_B["default"], std=0.3, generator=generator)
    return model


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gains the number of projections of each product with a bank."""
    found: list[int] = []
    apply_route = AtomBank.apply_route

    def watch(self: AtomBank, block: Any, u: Tensor) -> Tensor:
        found.append(u.shape[-2])
        return apply_route(self, block, u)

    monkeypatch.setattr(AtomBank, "apply_route", watch)
    return found


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_together_as_apart(
    backbone, adapt, ids, instructions, widths: list[int], kind: str, checkpointing: bool
) -> None:
    together = trained(adapt(backbone(kind), target_modules="all-linear")).double().train()
    if checkpointing:
        together.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    models = [together, apart(together)]
    outputs = []
    for model, expected in zip(models, ([3, 1, 2, 1], [1] * 7), strict=True):
        widths.clear()
        outputs.append(model(ids, instruction_ids=instructions, labels=ids))
        assert widths == expected * 4
        outputs[-1].loss.backward()
        assert widths == expected * 4 * (2 if checkpointing else 1)
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits)
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


class Attention(nn.Module):
    """Projections of the usual names, called in an order and with inputs that a subclass may choose."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, T, 6) to (B, T, 18), in the order of q, k and v."""
        return torch.cat([self.q_proj(h), self.k_proj(h), self.v_proj(h)], dim=-1)


class OneElse(Attention):
    """As in attention over what an encoder says: the query's input is not that of the others."""

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, T, 6) to (B, T, 18)."""
        other = h.flip(1)
        return torch.cat([self.q_proj(h), self.k_proj(other), self.v_proj(other)], dim=-1)


class Equal(Attention):
    """Inputs that are equal but no longer the same tensor."""

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, T, 6) to (B, T, 18)."""
        return torch.cat([self.q_proj(h), self.k_proj(h.clone()), self.v_proj(h)], dim=-1)


class KeysFirst(Attention):
    """Called in another order than registered, so that not the one that routes comes first."""

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, T, 6) to (B, T, 18)."""
        keys, values = self.k_proj(h), self.v_proj(h)
        return torch.cat([self.q_proj(h), keys, values], dim=-1)


class Twice(Attention):
    """One layer is called twice in a pass."""

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, T, 6) to (B, T, 18)."""
        return super().forward(h) + super().forward(2 * h)


class QueryLeftOut(Attention):
    """The second time a projection is not called, and its part is left over."""

    def forward(self, h: Tensor) -> Tensor:
        """Map (B, T, 6) to (B, T, 12)."""
        super().forward(h)
        self.q_proj(3 * h)
        return torch.cat([self.k_proj(2 * h), self.v_proj(2 * h)], dim=-1)


def adapted(module: type[Attention], **fields: Any) -> Any:
    """Return a model of one attention with its adapter, in float64."""
    torch.manual_seed(0)
    names = ["q_proj", "k_proj", "v_proj"]
    config = QueryableLoraConfig(
        r=3, num_atoms=4, top_k=2, num_blocks=1, prior_weight=0, target_modules=names, **fields
    )
    return trained(get_peft_model(nn.Sequential(module()), config)).double()


@pytest.mark.parametrize(
    ("module", "products"),
    [(Attention, [3]), (OneElse, [3, 1, 1]), (Equal, [3, 1]), (Twice, [3, 3]), (QueryLeftOut, [3, 3, 1, 1])],
)
def test_only_the_same_tensor_is_computed_together(
    widths: list[int], module: type[Attention], products: list[int]
) -> None:
    model = adapted(module)
    h = torch.randn(2, NUM_TOKENS, 6, dtype=torch.float64)
    output = model(h)
    assert widths == products
    torch.testing.assert_close(output, apart(model)(h))


def test_whichever_comes_first_lets_the_one_that_routes_do_so() -> None:
    model, usual = adapted(KeysFirst), adapted(Attention)
    h = torch.randn(2, NUM_TOKENS, 6, dtype=torch.float64)
    torch.testing.assert_close(model(h), usual(h))
    with pytest.raises(RuntimeError, match="a block has no route yet"):
        apart(model)(h)


def test_dropout_hides_other_places_from_each(widths: list[int]) -> None:
    model = adapted(Attention, lora_dropout=0.5).train()
    h = torch.randn(2, NUM_TOKENS, 6, dtype=torch.float64)
    model(h)
    assert widths == [1, 1, 1]
    widths.clear()
    model.eval()(h)
    assert widths == [3]


def test_nothing_is_kept_once_the_last_has_its_part(backbone, adapt, ids) -> None:
    model = adapt(backbone())
    seen: list[Any] = []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda layer, args, output: seen.extend(cast(Any, layer).routing_state))
    model(ids)
    assert len(seen) == len(layers_of(model))
    assert all(use.shared.x is None and not use.shared.parts for use in seen)
