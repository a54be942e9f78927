"""The growing bank's gate: which stage it sends a row to, from its state, its instruction, both or neither."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from continual.adapters.growing.gate import ABSTAIN, StageGate

LONG = 10**6  # tokens; a row of so many is as sharp as the features get


def lengths(rows: Tensor, tokens: int = LONG) -> Tensor:
    """Return the same length for every row."""
    return torch.full((len(rows),), tokens)


def unit(index: int, size: int = 4) -> Tensor:
    """Return an instruction's encoding, at right angles to those of other indices."""
    return torch.eye(size)[index]


def blobs(centres: Tensor, num_rows: int = 200, seed: int = 0) -> list[Tensor]:
    """Return rows about each centre, under one covariance that is not round."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.randn(centres.shape[1], centres.shape[1], generator=torch.Generator().manual_seed(9))
    return [centre + torch.randn(num_rows, len(centre), generator=generator) @ shape for centre in centres]


def learnt(centres: Tensor, instructions: list[Tensor] | None = None, **settings: float) -> StageGate:
    """Return a gate that has learnt a stage about each centre, named a, b, ..., of one centroid each."""
    gate = StageGate(centres.shape[1], 4, **settings)  # type: ignore[arg-type]
    for index, rows in enumerate(blobs(centres)):
        own = torch.zeros(4) if instructions is None else instructions[index]
        gate.add("abcdefgh"[index], rows, lengths(rows), torch.zeros(len(rows)), own)
    return gate


def far_apart(num_stages: int = 3, num_features: int = 5) -> Tensor:
    """Return centres that no row could be taken for another's."""
    return 100.0 * torch.eye(num_features)[:num_stages]


# -- the state --------------------------------------------------------------------------------------------------------


def test_a_row_like_the_background_is_no_stage_s() -> None:
    """Nearer to the background than to any stage, within a stage's radius or not."""
    gate = StageGate(5, 4)
    centres = torch.stack([torch.zeros(5), 8.0 * torch.eye(5)[0]])
    stage, background = blobs(centres)
    gate.set_background(background, lengths(background), torch.zeros(len(background)))
    gate.add("a", stage, lengths(stage), torch.zeros(len(stage)), torch.zeros(4))
    gate.stages["a"].radius = 1e6
    fresh_stage, fresh_background = blobs(centres, num_rows=100, seed=1)
    assert (gate.choose(fresh_background, lengths(fresh_background)) == ABSTAIN).float().mean() > 0.9
    assert (gate.choose(fresh_stage, lengths(fresh_stage)) == 0).float().mean() > 0.9
    restored = StageGate(5, 4)
    restored.restore(gate.tensors(), {"a": ["default"]})
    assert torch.equal(
        restored.logits(fresh_stage, lengths(fresh_stage), None), gate.logits(fresh_stage, lengths(fresh_stage), None)
    )


def test_text_that_comes_without_an_instruction_is_the_sooner_left_to_the_backbone() -> None:
    centres = torch.stack([torch.zeros(5), 6.0 * torch.eye(5)[0]])
    stage, background = blobs(centres)
    rows = torch.cat(blobs(centres, seed=1))
    given = unit(0).expand(len(rows), -1)
    stages_rows = {}
    for name, own, margin in (("told", unit(0), 0.0), ("told", unit(0), 4.0), ("untold", torch.zeros(4), 4.0)):
        gate = StageGate(5, 4, untold_margin=margin)
        gate.set_background(background, lengths(background), torch.zeros(len(background)))
        gate.add("a", stage, lengths(stage), torch.zeros(len(stage)), own)
        stages_rows[name, margin] = gate.choose(rows, lengths(rows)) == 0
        scores = gate._scores(rows, lengths(rows), None)
        within = scores[:, 1] > -gate.stages["a"].radius / (2 * gate.temperature)
        least = scores[:, 0] + (margin if name == "told" else 0.0)
        assert torch.equal(stages_rows[name, margin], within & (scores[:, 1] > least))
        if name == "told":  # with its instruction nothing is asked of a row besides
            least = torch.maximum(scores[:, :1], -gate._prepared(rows.device)[-1] / (2 * gate.temperature))
            least = least + gate.abstain_cosine / gate.prior_temperature
            expected = (scores[:, 1:] + 1 / gate.prior_temperature > least).squeeze(1)
            assert torch.equal(gate.choose(rows, lengths(rows), given) == 0, expected)
    assert stages_rows["told", 4.0].sum() < stages_rows["told", 0.0].sum()
    assert torch.equal(stages_rows["untold", 4.0], stages_rows["told", 0.0])


def test_a_stage_of_few_rows_keeps_its_own_beside_one_of_many() -> None:
    centres = torch.stack([torch.zeros(60), 0.5 * torch.ones(60)])
    gate = StageGate(60, 4)
    for name, num_rows, centre in zip("ab", (2000, 12), centres, strict=True):
        rows = centre + torch.randn(num_rows, 60, generator=torch.Generator().manual_seed(num_rows))
        gate.add(name, rows, lengths(rows), torch.arange(num_rows) % 4, torch.zeros(4))
    for stage, centre in enumerate(centres):  # means of three rows as they are would send home 56 % of the few's
        rows = centre + torch.randn(400, 60, generator=torch.Generator().manual_seed(7))
        scores = gate._scores(rows, lengths(rows), None)[:, 1:]
        assert (scores.argmax(dim=1) == stage).float().mean() > 0.9


def test_whether_rows_are_told_apart_is_judged_on_rows_left_out() -> None:
    """Two stages of one kind cannot be told apart, however few rows and many features there are."""
    gate, size = StageGate(200, 4), 200
    rows = torch.randn(300, size, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(4)
    assert (gate.add("a", rows[:150], lengths(rows[:150]), torch.zeros(150), none) == 0).all()
    best = gate.add("b", rows[150:], lengths(rows[150:]), torch.zeros(150), none)
    assert 0.3 < (best == 1).float().mean() < 0.7
    chosen = gate.choose(rows[150:], lengths(rows[150:]))
    assert (chosen == 1).float().mean() > 0.8  # what rows learnt by heart would have one believe


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(2, 6))
def test_choice_is_the_argmax_of_a_linear_discriminant_s_predictive_density(
    seed: int, num_stages: int, size: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate, groups = StageGate(size, 4, shrinkage=0.1), []
    for stage in range(num_stages):
        rows = torch.randn(30, size, generator=generator) + 2 * torch.randn(size, generator=generator)
        gate.add(str(stage), rows, lengths(rows), torch.zeros(len(rows)), torch.zeros(4))
        groups.append(rows.double().numpy())
    means = np.stack([rows.mean(axis=0) for rows in groups])
    covariance = sum((rows - rows.mean(axis=0)).T @ (rows - rows.mean(axis=0)) for rows in groups) / (30 * num_stages)
    shrunk = 0.9 * covariance + 0.1 * np.eye(size) * np.trace(covariance) / size
    num_dimensions = np.trace(covariance @ np.linalg.inv(shrunk))
    points = 3 * torch.randn(50, size, generator=generator)
    difference = points.double().numpy()[:, None] - means
    squared = np.einsum("nsf,fg,nsg->ns", difference, np.linalg.inv(shrunk), difference)
    squared = squared / (1 + 1 / 30) + num_dimensions * np.log(1 + 1 / 30)  # the mean of 30 rows is uncertain itself
    torch.testing.assert_close(gate.distances(points, lengths(points)).double().numpy(), squared, rtol=1e-3, atol=1e-3)
    for anchors in gate.stages.values():
        anchors.radius = math.inf  # no row is outside
    gate._ready = None
    logits = gate.logits(points, lengths(points), None)[:, 1:]
    torch.testing.assert_close(logits.double().numpy(), -squared / (2 * gate.temperature), rtol=1e-3, atol=1e-3)
    best = np.sort(squared, axis=1)
    clear = best[:, 1] - best[:, 0] > 1e-2
    assert (logits.argmax(dim=1).numpy() == squared.argmin(axis=1))[clear].all()


def test_a_short_row_is_less_certain() -> None:
    gate = learnt(far_apart())
    for anchors in gate.stages.values():
        anchors.rows_C = torch.full((1,), math.inf)  # the centroids are certain
    gate._ready = None
    rows = blobs(far_apart())[0][:20]
    long, short = (gate.distances(rows, lengths(rows, tokens)) for tokens in (LONG, 20))
    torch.testing.assert_close(short, long / (1 + gate.length_scale / 20), rtol=1e-4, atol=0)


def test_centroids_weigh_rows_by_their_length() -> None:
    gate, rows = StageGate(2, 4, pooling=0.0), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 5.0]])
    gate.add("a", rows, torch.tensor([20, LONG, 7]), torch.tensor([3, 3, 8]), torch.zeros(4))
    weights = torch.tensor([1 / 2, 1 / (1 + 20 / LONG)])
    expected = torch.stack([(weights[:, None] * rows[:2]).sum(dim=0) / weights.sum(), rows[2]])
    torch.testing.assert_close(gate.stages["a"].centroids_CF, expected)
    torch.testing.assert_close(gate.stages["a"].rows_C, torch.tensor([float(weights.sum()), 1 / (1 + 20 / 7)]))


def test_a_centroid_leans_towards_its_stage_as_if_more_rows_lay_there() -> None:
    rows = torch.cat([torch.tensor([[6.0, 0.0]]), torch.tensor([[0.0, 9.0]]).expand(20, -1)])
    groups = torch.tensor([0] + [1] * 20)
    pooled, plain, one = (StageGate(2, 4, pooling=pooling) for pooling in (4.0, 0.0, 4.0))
    for gate in (pooled, plain):
        gate.add("a", rows, lengths(rows), groups, torch.zeros(4))
    one.add("a", rows, lengths(rows), torch.zeros(21), torch.zeros(4))
    mean = rows.mean(dim=0)
    joined = torch.stack([torch.cat([rows[groups == group], mean.expand(4, -1)]).mean(dim=0) for group in (0, 1)])
    torch.testing.assert_close(pooled.stages["a"].centroids_CF, joined, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pooled.stages["a"].rows_C, torch.tensor([5.0, 24.0]), rtol=1e-4, atol=0)
    assert torch.equal(pooled.scatter_FF, plain.scatter_FF)  # what rows vary by is about their own mean
    torch.testing.assert_close(one.stages["a"].centroids_CF, mean.unsqueeze(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(one.stages["a"].rows_C, torch.tensor([21.0]), rtol=1e-4, atol=0)


def test_one_more_stage_far_away_changes_no_choice() -> None:
    centres = far_apart(4)
    gate, rows = learnt(centres[:3]), torch.cat(blobs(centres[:3], seed=1))
    before = gate.choose(rows, lengths(rows))
    assert set(before.tolist()) >= {0, 1, 2}
    new = blobs(centres, seed=2)[3]
    gate.add("d", new, lengths(new), torch.zeros(len(new)), torch.zeros(4))
    after = gate.choose(rows, lengths(rows))
    at_the_edge = (before == ABSTAIN) | (after == ABSTAIN)  # it moves a little as the covariance is better known
    assert torch.equal(after[~at_the_edge], before[~at_the_edge]) and (after != 3).all()
    assert (after != before).float().mean() < 0.02


@pytest.mark.parametrize("num_groups", [1, 8])
def test_ninety_nine_of_a_hundred_own_rows_lie_within_the_radius(num_groups: int) -> None:
    (rows,) = blobs(torch.zeros(1, 6), num_rows=1000)
    groups = torch.arange(1000) % num_groups
    rows += 30 * torch.nn.functional.one_hot(groups, 8)[:, :6].float() * (num_groups > 1)
    gate = StageGate(6, 4)
    gate.add("a", rows, lengths(rows, 30), groups, torch.zeros(4))
    assert len(gate.stages["a"].centroids_CF) == num_groups
    at_home = (gate.choose(rows, lengths(rows, 30)) == 0).float().mean().item()
    assert at_home == pytest.approx(0.99, abs=0.007)


@pytest.mark.parametrize("num_rows", [40, 300])
def test_rows_never_seen_lie_within_the_radius_too(num_rows: int) -> None:
    centres = 100.0 * torch.eye(80)[:2]  # more features than the first stage has rows, or nearly
    gate = StageGate(80, 4)
    for name, rows in zip("ab", blobs(centres, num_rows), strict=True):
        gate.add(name, rows, lengths(rows, 30), torch.arange(num_rows) % 2, torch.zeros(4))
        others = blobs(centres, 400, seed=8)["ab".index(name)]
        assert (gate.choose(others, lengths(others, 30)) == "ab".index(name)).float().mean() > 0.95


def test_rows_of_an_early_stage_stay_within_its_radius_as_the_covariance_narrows() -> None:
    centres = 100.0 * torch.eye(12)[:6]
    gate = StageGate(12, 4)
    for stage, centre in enumerate(centres):  # rows of all stages but the first hardly vary
        rows = centre + (blobs(torch.zeros(1, 12), 300, seed=stage)[0] * (1.0 if stage == 0 else 0.05))
        gate.add(str(stage), rows, lengths(rows), torch.zeros(300), torch.zeros(4))
    rows = blobs(centres[:1], 300, seed=9)[0]
    assert (gate.choose(rows, lengths(rows)) == 0).float().mean() > 0.95


def test_a_row_outside_of_every_radius_goes_nowhere() -> None:
    gate = learnt(torch.tensor([[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]))
    points = 12 * torch.rand(400, 3) - 5
    squared = gate.distances(points, lengths(points))
    radii = torch.tensor([anchors.radius for anchors in gate.stages.values()])
    outside = (squared > radii).all(dim=1)
    assert 20 < outside.sum() < 380
    assert torch.equal(gate.choose(points, lengths(points)) == ABSTAIN, outside)


# -- the instruction --------------------------------------------------------------------------------------------------


def test_without_text_the_instruction_decides() -> None:
    gate = learnt(far_apart(), [unit(0), unit(1), unit(2)])
    rows = torch.randn(4, 5) * 100
    chosen = gate.choose(rows, torch.zeros(4, dtype=torch.long), torch.stack([unit(i) for i in (2, 0, 1, 3)]))
    assert chosen.tolist() == [2, 0, 1, ABSTAIN]  # the last is like no stage's


@pytest.mark.parametrize("cosine, chosen", [(1.0, 1), (0.5, 1), (0.2, ABSTAIN)])
def test_without_text_a_like_instruction_finds_its_stage(cosine: float, chosen: int) -> None:
    gate = learnt(far_apart(), [unit(0), unit(1), unit(2)])
    given = (cosine * unit(1) + math.sqrt(1 - cosine**2) * unit(3)).unsqueeze(0)
    assert gate.choose(torch.zeros(1, 5), torch.zeros(1, dtype=torch.long), 7 * given).tolist() == [chosen]


def test_equal_states_are_told_apart_by_the_instruction() -> None:
    gate = learnt(torch.zeros(2, 5), [unit(0), unit(1)])
    rows = blobs(torch.zeros(1, 5), seed=3)[0]
    for stage in (0, 1):
        chosen = gate.choose(rows, lengths(rows), unit(stage).expand(len(rows), -1))
        assert (chosen == stage).float().mean() > 0.98


def test_equal_instructions_are_told_apart_by_the_state() -> None:
    gate = learnt(far_apart(), [unit(0)] * 3)
    for stage, rows in enumerate(blobs(far_apart(), seed=3)):
        assert (gate.choose(rows, lengths(rows), unit(0).expand(len(rows), -1)) == stage).all()


def test_a_misleading_instruction_does_not_outweigh_a_state_that_is_far_away() -> None:
    gate = learnt(far_apart(), [unit(0), unit(1), unit(2)])
    rows = blobs(far_apart(), seed=3)[0]
    assert (gate.choose(rows, lengths(rows), unit(1).expand(len(rows), -1)) != 1).all()


def test_no_instruction_is_the_state_alone() -> None:
    gate = learnt(far_apart() / 40, [unit(0), unit(1), unit(2)])
    rows = torch.cat(blobs(far_apart() / 40, seed=3))
    alone = gate.logits(rows, lengths(rows), None)
    assert torch.equal(gate.logits(rows, lengths(rows), torch.zeros(len(rows), 4)), alone)


def test_neither_text_nor_instruction_goes_nowhere() -> None:
    gate = learnt(far_apart(), [unit(0), unit(1), unit(2)])
    assert gate.choose(torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)).tolist() == [ABSTAIN, ABSTAIN]


def test_an_empty_gate_sends_every_row_nowhere() -> None:
    assert StageGate(5, 4).choose(torch.randn(3, 5), torch.tensor([4, 0, 9])).tolist() == [ABSTAIN] * 3


# -- rows together, stages gone, the disk -----------------------------------------------------------------------------


def test_a_row_alone_is_sent_where_it_is_in_a_batch() -> None:
    gate = learnt(far_apart() / 40, [unit(0), unit(1), unit(2)])
    rows, tokens = torch.cat(blobs(far_apart() / 40, num_rows=12, seed=3)), torch.arange(36)
    given = torch.stack([unit(i % 4) * (i % 5 > 0) for i in range(36)])
    together = gate.logits(rows, tokens, given)
    alone = torch.cat([gate.logits(rows[i : i + 1], tokens[i : i + 1], given[i : i + 1]) for i in range(36)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)
    assert torch.equal(alone.argmax(dim=1), together.argmax(dim=1))


def test_restored_it_is_the_same_to_the_bit() -> None:
    gate = learnt(far_apart() / 40, [unit(0), unit(1), unit(2)], temperature=3.0)
    gate.stages["b"].adapters = ["default", "stage02"]
    other = StageGate(**gate.settings)
    other.restore(gate.tensors(), {name: anchors.adapters for name, anchors in gate.stages.items()})
    rows = torch.cat(blobs(far_apart() / 40, seed=3))
    given = unit(1).expand(len(rows), -1)
    assert torch.equal(other.logits(rows, lengths(rows), given), gate.logits(rows, lengths(rows), given))
    assert other.stages["b"].adapters == ["default", "stage02"] and other.num_numbers == gate.num_numbers
    assert {name: t.tolist() for name, t in other.tensors().items()} == {
        name: t.tolist() for name, t in gate.tensors().items()
    }


def test_it_keeps_no_rows() -> None:
    gate = learnt(far_apart())
    assert gate.num_numbers == sum(tensor.numel() for tensor in gate.tensors().values()) - 1  # the count of rows
    gate.add("big", torch.randn(5000, 5), torch.full((5000,), 9), torch.arange(5000) % 3, torch.zeros(4))
    assert gate.num_numbers == 3 * (5 + 1 + 4 + 1) + (3 * 5 + 3 + 4 + 1) + 5 * 6 // 2


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000))
def test_dropping_a_stage_leaves_the_choices_of_the_other_rows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gate = StageGate(3, 4)
    for index in range(4):  # stages of unlike widths that overlap
        width = 0.3 + 3 * torch.rand(1, generator=generator)
        rows = torch.randn(40, 3, generator=generator) * width + 3 * torch.randn(3, generator=generator)
        own = torch.nn.functional.normalize(torch.randn(4, generator=generator), dim=0)
        gate.add(str(index), rows, lengths(rows, 40), torch.arange(40) % 3, own)
    points, tokens = 4 * torch.randn(200, 3, generator=generator), torch.full((200,), 40)
    given = torch.randn(200, 4, generator=generator)
    names = [*gate.stages, "nowhere"]
    before = [names[index] for index in gate.choose(points, tokens, given)]
    gate.drop("1")
    names = [*gate.stages, "nowhere"]
    after = [names[index] for index in gate.choose(points, tokens, given)]
    assert [pair for pair in zip(before, after, strict=True) if pair[0] not in ("1", pair[1])] == []
