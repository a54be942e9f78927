"""What must hold for every configuration: convex hull, norm bounds, row invariance, causality, padding, ablations."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor
from torch.linalg import matrix_norm, vector_norm

from continual.adapters import QueryableLoraConfig
from continual.adapters.config import QuerySource
from continual.adapters.queryable.layer import QueryableLinear
from continual.adapters.queryable.router import AtomBank

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "r": st.integers(1, 6),
    "num_atoms": st.integers(1, 7),
    "top_k": st.integers(1, 7),
    "num_blocks": st.integers(1, 4),
    "prior_weight": st.sampled_from([0.0, 0.5, 3.0]),
    "prior_temperature": st.sampled_from([0.1, 1.0]),
    "query_source": st.sampled_from(get_args(QuerySource)),
    "use_depth_summary": st.booleans(),
    "detach_query": st.booleans(),
    "init_atoms": st.sampled_from(["orthogonal", "noise", "identity"]),
    "init_atoms_scale": st.sampled_from([0.0, 0.5, 1.0, 4.0]),
    "key_dim": st.sampled_from([None, 1, 5]),
}
configs = st.fixed_dictionaries(FIELDS).filter(
    lambda fields: not fields["query_source"].startswith("instruction") or fields["prior_weight"] > 0
)
magnitudes = st.sampled_from([1e-8, 1.0, 1e4])


def complete(fields: dict[str, Any]) -> dict[str, Any]:
    """Bring top_k within num_atoms."""
    return fields | {"top_k": min(fields["top_k"], fields["num_atoms"])}


@settings(max_examples=60, deadline=None)
@given(fields=configs, seed=st.integers(0, 2**16), magnitude=magnitudes, with_instruction=st.booleans())
def test_routes_weights_and_operator_of_any_bank(
    fields: dict[str, Any], seed: int, magnitude: float, with_instruction: bool
) -> None:
    torch.manual_seed(seed)
    config = QueryableLoraConfig(**complete(fields))
    bank = AtomBank(config, 5 if config.uses_prior else 0).double()
    if config.uses_summary:
        torch.nn.init.normal_(bank.summary_queries, std=3)
    state = bank.begin(torch.randn(2, 5) if with_instruction else None)
    largest = matrix_norm(bank.atoms, ord=2).max()
    for block in range(config.num_blocks):
        u = torch.randn(2, 3, config.r, dtype=torch.float64) * magnitude
        bank.route(state.blocks[block], u)
        alpha, z = state.blocks[block].route, state.blocks[block].state
        assert alpha is not None and z is not None
        assert alpha.shape == (2, 3, config.num_atoms)
        # Convex weights, at most k of them, or all alike where nothing asks: there is no top k among equal logits.
        assert (alpha >= 0).all()
        torch.testing.assert_close(alpha.sum(dim=-1), torch.ones(2, 3, dtype=torch.float64))
        if config.query_source == "uniform" or (config.query_source.startswith("instruction") and not with_instruction):
            torch.testing.assert_close(alpha, torch.full_like(alpha, 1 / config.num_atoms))
        else:
            assert ((alpha > 0).sum(dim=-1) <= config.top_k).all()
        # S_b = sum_m alpha_m C_m: in the convex hull of the atoms by those weights; Theorem D.8.
        operator = torch.einsum("btm,mij->btij", alpha, bank.atoms)
        expected = config.lora_alpha / config.r * torch.einsum("btij,btj->bti", operator, u)
        torch.testing.assert_close(
            bank.apply_route(state.blocks[block], u.unsqueeze(-2)).squeeze(-2),
            expected,
            rtol=1e-9,
            atol=1e-12 * magnitude,
        )
        assert (matrix_norm(operator, ord=2) <= largest * (1 + 1e-9)).all()
        # ||s_b|| <= max_j ||z_j||, and s_1 = 0.
        summary = bank.depth_summary(state.blocks[block], z) if config.uses_summary else torch.zeros_like(z)
        earlier = [vector_norm(s, dim=-1) for s in (b.state for b in state.blocks[:block]) if s is not None]
        bound = torch.stack(earlier).amax(dim=0) if earlier else torch.zeros(2, 3, dtype=torch.float64)
        assert (vector_norm(summary, dim=-1) <= bound * (1 + 1e-9)).all()


@settings(max_examples=40, deadline=None)
@given(rank=st.integers(1, 6), seed=st.integers(0, 2**16), magnitude=magnitudes)
def test_state_norm_jacobian_is_at_most_one_over_the_root_mean_square(rank: int, seed: int, magnitude: float) -> None:
    torch.manual_seed(seed)
    bank = AtomBank(QueryableLoraConfig(r=rank, num_atoms=2, top_k=1, num_blocks=1, prior_weight=0), 0).double()
    u = torch.randn(rank, dtype=torch.float64) * magnitude

    def state_of(value: Tensor) -> Tensor:
        state = bank.begin(None)
        bank.route(state.blocks[0], value)
        assert state.blocks[0].state is not None
        return state.blocks[0].state

    jacobian = torch.autograd.functional.jacobian(state_of, u)
    rho = (u.square().mean() + 1e-6).sqrt()  # Lemma D.10
    assert matrix_norm(torch.as_tensor(jacobian), ord=2) <= (1 + 1e-9) / rho
    assert vector_norm(state_of(u)) <= rank**0.5 * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(fields=configs, seed=st.integers(0, 2**16))
def test_update_is_bounded_for_any_configuration(plain_model, adapt, fields: dict[str, Any], seed: int) -> None:
    model = adapt(plain_model(torch.float64), lora_alpha=3, **complete(fields))
    radius = matrix_norm(model.base_model.queryable_bank["default"].atoms, ord=2).max()
    bounds: list[tuple[Tensor, Tensor]] = []

    def watch(layer: QueryableLinear, args: tuple[Tensor], output: Tensor) -> None:
        weight_a, weight_b = layer.queryable_A["default"], layer.queryable_B["default"]
        factor = 3 / fields["r"] * matrix_norm(weight_b, ord=2) * radius * matrix_norm(weight_a, ord=2)
        update = output - layer.get_base_layer()(args[0])
        bounds.append((vector_norm(update, dim=-1), factor * vector_norm(args[0], dim=-1)))  # Corollary D.8.1

    for module in model.modules():
        if isinstance(module, QueryableLinear):
            module.register_forward_hook(watch)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed)).double()
    model(x, instruction_encoding=torch.randn(4, 5))
    assert len(bounds) == 10
    assert all((update <= bound * (1 + 1e-9) + 1e-12).all() for update, bound in bounds)


@pytest.fixture
def wide(backbone, adapt) -> PeftModel:
    """A language model in float64 whose adapter changes much."""
    return adapt(backbone(dtype=torch.float64), num_blocks=3)


def test_a_row_is_the_same_alone_and_in_any_batch(wide, ids, instructions) -> None:
    together = wide(ids, instruction_ids=instructions).logits
    for row in range(3):
        alone = wide(ids[row : row + 1], instruction_ids=instructions[row : row + 1]).logits
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-6)  # encodings are float32
    order = [2, 0, 1]
    shuffled = wide(ids[order], instruction_ids=instructions[order]).logits
    torch.testing.assert_close(shuffled, together[order], rtol=0, atol=1e-6)
    alone = wide(ids[1:2]).logits
    torch.testing.assert_close(alone[0], wide(ids).logits[1], rtol=0, atol=1e-11)


def test_a_token_changes_nothing_before_it(wide, ids, instructions) -> None:
    changed = ids.clone()
    changed[:, 7] = 50
    before, after = (wide(x, instruction_ids=instructions).logits for x in (ids, changed))
    torch.testing.assert_close(after[:, :7], before[:, :7], rtol=0, atol=1e-12)
    assert ((after - before)[:, 7:].abs().amax(dim=-1) > 1e-6).all()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(backbone, adapt, ids, instructions, kind: str, side: str) -> None:
    model = adapt(backbone(kind, torch.float64))
    expected = model(ids, instruction_ids=instructions).logits
    pad = torch.zeros(3, 4, dtype=torch.long)
    ones = torch.ones_like(ids)
    left = side == "left"
    padded = torch.cat([pad, ids] if left else [ids, pad], dim=1)
    mask = torch.cat([pad, ones] if left else [ones, pad], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
    kwargs = {"attention_mask": mask, "position_ids": positions, "instruction_ids": instructions}
    out = model(padded, **kwargs).logits
    torch.testing.assert_close(out[:, 4:] if left else out[:, :11], expected, rtol=0, atol=1e-10)
    longer = torch.cat([instructions, torch.full((3, 5), -1)], dim=1)
    torch.testing.assert_close(model(ids, instruction_ids=longer).logits, expected, rtol=0, atol=1e-6)


# -- ablations --------------------------------------------------------------------------------------------------------


def routes_of(model: PeftModel, ids: Tensor, **kwargs: Any) -> list[Tensor]:
    """Return alpha of each block, (B, T, M)."""
    with model.base_model.record_routes() as record:  # type: ignore[operator]
        model(ids, **kwargs)
    return record[0]["default"]


def test_no_instruction_is_the_uniform_prior(backbone, adapt, ids, instructions) -> None:
    model = adapt(backbone())
    without = adapt(backbone(), prior_weight=0)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in without.named_parameters():
            parameter.copy_(own[name])
    expected = routes_of(without, ids)
    nothing = torch.full((3, 2), -1)
    for kwargs in ({}, {"instruction_ids": nothing}, {"instruction_encoding": torch.zeros(3, 32)}):
        for route, other in zip(routes_of(model, ids, **kwargs), expected, strict=True):
            torch.testing.assert_close(route, other, rtol=0, atol=1e-6)
    # ... and an instruction does change the routes, also beside a row that has none.
    mixed = routes_of(model, ids, instruction_ids=instructions)
    assert all((m[0] - e[0]).abs().max() > 1e-3 for m, e in zip(mixed, expected, strict=True))
    assert all(torch.allclose(m[2], e[2], atol=1e-6) for m, e in zip(mixed, expected, strict=True))


def test_prior_weight_zero_has_no_prior_and_ignores_instructions(backbone, adapt, ids, instructions) -> None:
    model = adapt(backbone(), prior_weight=0)
    assert not [n for n in model.state_dict() if "prior" in n or "instruction" in n]
    assert torch.equal(model(ids, instruction_ids=instructions).logits, model(ids).logits)


@pytest.mark.parametrize("detached", [True, False])
def test_detach_query_cuts_the_routes_from_the_low_rank_states(backbone, adapt, ids, detached: bool) -> None:
    model = adapt(backbone(), detach_query=detached, num_blocks=3)
    matrices = {n: p for n, p in model.named_parameters() if "queryable_A" in n}
    bank = model.base_model.queryable_bank["default"]
    routes = routes_of(model, ids)
    total = torch.stack([(r * torch.arange(6)).sum() for r in routes]).sum()
    *grads, of_maps = torch.autograd.grad(total, [*matrices.values(), bank.query_maps], allow_unused=True)
    reached = [n for n, g in zip(matrices, grads, strict=True) if g is not None and g.abs().max() > 0]
    assert of_maps.abs().max() > 0
    assert bool(reached) is not detached


def test_frozen_random_maps_are_saved_but_not_trained(backbone, adapt) -> None:
    model = adapt(backbone(), query_source="frozen_random")
    name = "base_model.queryable_bank.default.query_maps"
    assert name in model.state_dict()
    assert name not in dict(model.named_parameters())
    assert "base_model.queryable_bank.default.keys" in dict(model.named_parameters())


def test_instruction_only_routes_all_tokens_of_a_row_alike(backbone, adapt, ids) -> None:
    model = adapt(backbone(), query_source="instruction_only")
    instructions = torch.tensor([[5, 6], [30, 31], [70, 71]])
    routes = routes_of(model, ids, instruction_ids=instructions)
    for route in routes:
        assert torch.equal(route, route[:, :1].expand_as(route))
        assert (route[0, 0] - route[1, 0]).abs().max() > 1e-3
    assert torch.equal(routes[0], routes[1])
    assert not [n for n in model.state_dict() if n.endswith((".keys", ".query_maps", ".summary_queries"))]


def test_instruction_query_routes_by_the_instruction_alone_and_each_block_by_its_own_map(backbone, adapt, ids) -> None:
    model = adapt(backbone(), query_source="instruction_query")
    bank = model.base_model.queryable_bank["default"]
    instructions = torch.tensor([[5, 6], [30, 31], [70, 71]])
    routes = routes_of(model, ids, instruction_ids=instructions)
    for route in routes:
        assert torch.equal(route, route[:, :1].expand_as(route))  # no token's state enters
        assert (route[0, 0] - route[1, 0]).abs().max() > 1e-3
    assert (routes[0] - routes[1]).abs().max() > 1e-3  # W_b is the block's own
    total = torch.stack([(route * torch.arange(6)).sum() for route in routes]).sum()
    trained = [bank.query_maps, bank.keys, bank.prior_map, bank.prior_keys]
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(total, trained))
    for route in routes_of(model, ids):  # no instruction: equal logits
        assert torch.equal(route, torch.full_like(route, 1 / 6))


def test_uniform_weighs_all_atoms_alike_whatever_top_k(backbone, adapt, ids, instructions) -> None:
    model = adapt(backbone(), query_source="uniform")
    for route in routes_of(model, ids, instruction_ids=instructions):
        assert torch.equal(route, torch.full_like(route, 1 / 6))
    bank = model.base_model.queryable_bank["default"]
    assert [n for n, _ in bank.named_parameters()] == ["atoms"]


def test_one_block_routes_once_and_has_no_depth_summary(backbone, adapt, ids) -> None:
    model = adapt(backbone(), num_blocks=1)
    assert len(routes_of(model, ids)) == 1
    bank = model.base_model.queryable_bank["default"]
    assert not hasattr(bank, "summary_queries")
    assert bank.query_maps.shape == (1, 8, 4)


def test_depth_summary_field_decides_whether_later_blocks_see_earlier_states(backbone, adapt, ids) -> None:
    assert adapt(backbone(), use_depth_summary=False).base_model.queryable_bank["default"].query_maps.shape == (2, 8, 4)
    model = adapt(backbone())
    bank = model.base_model.queryable_bank["default"]
    before = routes_of(model, ids)
    with torch.no_grad():
        bank.query_maps[:, :, 4:] = 0  # the half that reads the summary
    after = routes_of(model, ids)
    assert torch.equal(after[0], before[0])  # s_1 = 0
    assert (after[1] - before[1]).abs().max() > 1e-3


def test_top_k_of_all_atoms_keeps_all(backbone, adapt, ids) -> None:
    assert all((r > 0).all() for r in routes_of(adapt(backbone(), top_k=6), ids))
    assert all(((r > 0).sum(dim=-1) == 2).all() for r in routes_of(adapt(backbone()), ids))


@pytest.mark.parametrize(("kind", "scale"), [("identity", 1.0), ("noise", 0.1), ("orthogonal", 1.0)])
def test_atoms_start_as_asked(kind: Any, scale: float) -> None:
    torch.manual_seed(0)
    config = QueryableLoraConfig(r=8, num_atoms=5, top_k=2, init_atoms=kind, init_atoms_scale=scale, prior_weight=0)
    atoms = AtomBank(config, 0).atoms
    distance = matrix_norm(atoms - torch.eye(8))
    if kind == "identity":
        assert distance.max() == 0
    elif kind == "noise":
        assert 0 < distance.max() < 0.1 * 8**0.5 * 2
    else:
        torch.testing.assert_close(atoms @ atoms.mT, torch.eye(8).expand(5, 8, 8), rtol=0, atol=1e-5)
        assert distance.min() > 1
