"""The theory's bounds along a real run: ratios worked by hand, none above 1, and training goes on as without them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from contexts import context
from peft import LoraConfig
from torch.linalg import vector_norm

from continual.adapters import QueryableLoraConfig
from continual.adapters.queryable.router import AtomBank
from continual.callbacks import TheoryRecorder
from continual.callbacks.theory import RATIOS, measure


def batch_of(module: Any, data: Any) -> dict[str, Any]:
    return data.collate(data.train_rows)


@pytest.mark.parametrize("kind", ["labels", "regression"])
def test_no_ratio_is_above_one_and_every_bound_is_measured(make_module, make_data, kind: str) -> None:
    module = make_module("causal_lm" if kind == "labels" else "regressor")
    found = measure(module, batch_of(module, make_data(module, kind)))
    assert {metric for metric, _ in found} == set(RATIOS)
    assert {block for metric, block in found if metric == "summary"} == {1}  # s_1 = 0
    for (metric, _), (value, count) in found.items():
        assert 0 < value <= 1 + 1e-5, metric
        assert count > 0


def test_a_rank_of_one_by_hand(make_module, make_data) -> None:
    fields: dict[str, Any] = {"target_modules": ["head"], "num_blocks": 1, "prior_weight": 0.0}
    config = QueryableLoraConfig(r=1, num_atoms=2, top_k=2, init_atoms="identity", **fields)
    module = make_module("regressor", config)
    data = make_data(module, "regression")
    batch = batch_of(module, data)
    seen: list[torch.Tensor] = []
    module.model.base_model.model.head.register_forward_hook(lambda layer, args, output: seen.append(args[0]))
    found = measure(module, batch)
    weight_A = module.model.base_model.model.head.queryable_A["default"]
    # ||B (a . h)|| / (||B|| ||a|| ||h||) is the cosine of a and h; both atoms are 1.
    cosine = (seen[0] @ weight_A.T).squeeze(-1).abs() / (vector_norm(weight_A) * vector_norm(seen[0], dim=-1))
    assert found["update", 0][0] == pytest.approx(cosine.max().item(), rel=1e-5)
    assert found["operator", 0][0] == pytest.approx(1.0)
    assert found["weights", 0][0] == pytest.approx(1.0)


def test_a_broken_bound_shows(make_module, make_data, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module("regressor")
    batch = batch_of(module, make_data(module, "regression"))
    summary, apply_route = AtomBank.depth_summary, AtomBank.apply_route
    before = measure(module, batch)
    monkeypatch.setattr(AtomBank, "depth_summary", lambda *args: 40 * summary(*args))
    monkeypatch.setattr(AtomBank, "apply_route", lambda *args: 1000 * apply_route(*args))
    after = measure(module, batch)
    assert after["summary", 1][0] > 1 >= before["summary", 1][0]
    assert after["update", 0][0] == pytest.approx(1000 * before["update", 0][0], rel=1e-4)


def test_training_goes_on_as_without_it(make_module, make_data, make_trainer) -> None:
    ends = []
    for recorders in ([], [TheoryRecorder(interval=2)]):
        config = QueryableLoraConfig(r=2, num_atoms=3, top_k=2, num_blocks=2, prior_weight=0.0, lora_dropout=0.3)
        module = make_module(adapter=config)
        data = make_data(module, "labels", batch_size=2)
        for recorder in recorders:
            recorder.begin(context(1))
        torch.manual_seed(5)
        make_trainer(*recorders, max_epochs=1).fit(module, datamodule=data)
        ends.append(torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad]))
        if recorders:
            rows = recorders[0].rows
            assert {row["step"] for row in rows} == {1, 2, 4}
            assert {row["metric"] for row in rows} == set(RATIOS)
            assert all(row["value"] <= 1 + 1e-5 for row in rows)
    assert torch.equal(*ends)


def test_an_adapter_without_a_bank_leaves_no_rows(make_module, make_data) -> None:
    module = make_module("regressor", LoraConfig(r=2, target_modules=["head"]))
    assert measure(module, batch_of(module, make_data(module, "regression"))) == {}
