"""Penalties and projections do what their equations say: EWC and its Fisher, LwF, A-GEM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from continual.runtime.parameters import flat, flat_gradient, trainable
from continual.strategies import AGEM, EWC, LwF, OnlineEWC
from continual.strategies.agem import project
from continual.strategies.fisher import fisher_diagonal


@pytest.fixture
def softmax_regression() -> tuple[nn.Linear, Tensor, Tensor]:
    """A softmax regression W, (4, 3), with inputs, (6, 3), and true classes, (6,)."""
    torch.manual_seed(0)
    return nn.Linear(3, 4, bias=False), torch.randn(6, 3), torch.randint(4, (6,))


def _rows(layer: nn.Linear, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return ((layer(x[i : i + 1]), y[i : i + 1]) for i in range(len(x)))


def test_fisher_estimators_against_closed_forms(softmax_regression: tuple[nn.Linear, Tensor, Tensor]) -> None:
    layer, x, y = softmax_regression
    with torch.no_grad():
        p = layer(x).softmax(dim=-1)
        squares = x.square().unsqueeze(1)
        exact = ((p * (1 - p)).unsqueeze(2) * squares).mean(dim=0).flatten()
        empirical = ((nn.functional.one_hot(y, 4) - p).square().unsqueeze(2) * squares).mean(dim=0).flatten()
    parameters = list(layer.parameters())
    torch.testing.assert_close(fisher_diagonal(_rows(layer, x, y), parameters, "exact"), exact)
    torch.testing.assert_close(fisher_diagonal(_rows(layer, x, y), parameters, "empirical"), empirical)
    generator = torch.Generator().manual_seed(0)
    draws = [fisher_diagonal(_rows(layer, x, y), parameters, "sampled", generator) for _ in range(600)]
    standard_error = torch.stack(draws).std(dim=0) / 600**0.5
    assert ((torch.stack(draws).mean(dim=0) - exact).abs() < 4 * standard_error + 1e-6).all()
    assert (exact - empirical).abs().max() > 0.05  # they are not one another


def test_fisher_of_two_tokens_in_a_row_is_their_mean() -> None:
    layer, x = nn.Linear(3, 4, bias=False), torch.randn(2, 3)
    parameters, y = list(layer.parameters()), torch.tensor([0, 1])
    together = fisher_diagonal([(layer(x), y)], parameters, "exact")
    torch.testing.assert_close(together, fisher_diagonal(_rows(layer, x, y), parameters, "exact"))


def test_fisher_of_a_regression_is_the_mean_square_of_its_inputs() -> None:
    layer, x, y = nn.Linear(3, 1, bias=False), torch.randn(5, 3), torch.randn(5)
    parameters = list(layer.parameters())
    rows = [(layer(x[i]), y[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(fisher_diagonal(rows, parameters, "exact"), x.square().mean(dim=0))
    residual = (y - layer(x).squeeze(1).detach()).square().unsqueeze(1)
    torch.testing.assert_close(fisher_diagonal(rows, parameters, "empirical"), (residual * x.square()).mean(dim=0))
    generator = torch.Generator().manual_seed(0)
    draws = [fisher_diagonal(rows, parameters, "sampled", generator) for _ in range(500)]
    torch.testing.assert_close(torch.stack(draws).mean(dim=0), x.square().mean(dim=0), rtol=0.2, atol=0)


@pytest.mark.parametrize("estimator", ["exact", "sampled", "empirical"])
def test_ewc_pulls_back(estimator: str, prepared: Callable[..., Any]) -> None:
    module, stages = prepared("EWC", weight=3.0, estimator=estimator, fisher_rows=1)
    strategy: EWC = module.strategy
    parameters = trainable(module)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    strategy.start(module, stages[0], 1)
    assert strategy.penalty(module, {}, torch.zeros(())) is None
    strategy.end_stage(module, stages[0], 1)
    assert strategy.fisher_KP.min() >= 0 and strategy.fisher_KP.max() > 0
    start = flat([parameter.detach() for parameter in parameters])
    assert strategy.penalty(module, {}, torch.zeros(())).item() == 0  # type: ignore[union-attr]
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter))
    moved = flat([parameter.detach() for parameter in parameters])
    penalty = strategy.penalty(module, {}, torch.zeros(()))
    assert penalty is not None
    expected = 1.5 * (strategy.fisher_KP[0] * (moved - start).square()).sum()
    torch.testing.assert_close(penalty, expected)
    torch.testing.assert_close(flat_gradient(penalty, parameters), 3.0 * strategy.fisher_KP[0] * (moved - start))


def test_ewc_has_a_term_for_each_stage_and_online_ewc_one_that_fades() -> None:
    fishers, anchors = torch.rand(3, 4), torch.randn(3, 4)
    ewc, online = EWC(), OnlineEWC(decay=0.5)
    for fisher, anchor in zip(fishers, anchors, strict=True):
        ewc.keep(fisher, anchor)
        online.keep(fisher, anchor)
    assert torch.equal(ewc.fisher_KP, fishers) and torch.equal(ewc.anchor_KP, anchors)
    torch.testing.assert_close(online.fisher_KP, (0.25 * fishers[0] + 0.5 * fishers[1] + fishers[2]).unsqueeze(0))
    assert torch.equal(online.anchor_KP, anchors[2:])


@pytest.mark.parametrize("adapter", ["lora", "queryable", "regressor"])
def test_lwf_starts_at_nothing_and_holds_the_old_answers(adapter: str, prepared: Callable[..., Any]) -> None:
    module, stages = prepared("LwF", adapter, temperature=2.0, weight=3.0)
    strategy: LwF = module.strategy
    with torch.no_grad():
        for parameter in trainable(module):
            parameter.add_(0.1 * torch.randn_like(parameter))
    strategy.start(module, stages[0], 1)
    batch = strategy.collate(module, stages[0].train_rows[:3])
    assert strategy.penalty(module, batch, module.outputs(batch)) is None  # nothing was learnt before
    strategy.start(module, stages[1], 2)
    batch = strategy.collate(module, stages[1].train_rows[:3])
    before = module.outputs(batch)
    penalty = strategy.penalty(module, batch, before)
    assert penalty is not None and abs(penalty.item()) < 1e-6
    with torch.no_grad():
        for parameter in trainable(module):
            parameter.add_(0.3 * torch.randn_like(parameter))
    kept = [parameter.clone() for parameter in trainable(module)]
    outputs = module.outputs(batch)
    penalty = strategy.penalty(module, batch, outputs)
    assert penalty is not None
    if adapter == "regressor":
        expected = (outputs - before).square().mean()
    else:
        old, new = (module.answer_outputs(batch, z / 2).log_softmax(-1) for z in (before, outputs))
        expected = 4 * (old.exp() * (old - new)).sum(dim=-1).mean()
    torch.testing.assert_close(penalty, 3 * expected)
    assert flat_gradient(penalty, trainable(module)).norm() > 0
    assert all(torch.equal(a, b) for a, b in zip(kept, trainable(module), strict=True))
    assert module.model.training


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 20))
def test_projected_gradient_has_no_product_against_the_memory(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradient, reference = (torch.randn(size, generator=generator) for _ in range(2))
    projected = project(gradient, reference)
    assert projected @ reference >= -1e-5 * gradient.norm() * reference.norm()
    if gradient @ reference >= 0:
        assert torch.equal(projected, gradient)
    else:
        assert projected.norm() <= gradient.norm() * (1 + 1e-6)
    assert torch.equal(project(gradient, torch.zeros(size)), gradient)


def test_agem_projects_the_gradients_of_a_step(prepared: Callable[..., Any]) -> None:
    module, stages = prepared("AGEM", size=4, memory_batch_size=4)
    strategy: AGEM = module.strategy
    optimizer: Any = None
    strategy.start(module, stages[0], 1)
    strategy.on_before_optimizer_step(optimizer, module, optimizer)  # no rows yet: nothing happens
    assert all(parameter.grad is None for parameter in trainable(module))
    with torch.no_grad():
        for parameter in trainable(module):
            parameter.add_(0.1 * torch.randn_like(parameter))
    strategy.end_stage(module, stages[0], 1)
    strategy.start(module, stages[1], 2)
    batch = strategy.collate(module, [item.row for item in strategy.memory.items])
    parameters = trainable(module)
    reference = flat_gradient(module.loss(batch, module.outputs(batch)), parameters)
    opposed = torch.randn_like(reference) - reference * (2 + reference.norm() ** -1)
    for parameter, part in zip(parameters, opposed.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter).clone()
    assert opposed @ reference < 0
    strategy.on_before_optimizer_step(optimizer, module, optimizer)
    taken = flat([parameter.grad for parameter in parameters if parameter.grad is not None])
    assert (taken @ reference).abs() < 1e-4 * taken.norm() * reference.norm()
    torch.testing.assert_close(taken, project(opposed, reference), rtol=1e-3, atol=1e-5)
