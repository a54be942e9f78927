"""Every number of summary.json worked by hand on runs of three and of four tasks; what is known to be wrong elsewhere.

The literals were worked out on paper from the matrices and usages below, at six decimals; no function of the package
made them. A measure without a literal here fails the first test.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import summarise
from analysis.measures import forgetting, routing
from analysis.runs import tables
from analysis.runs.load import Run, _ordered
from analysis.summaries import intervals
from analysis.summaries.summary import KEYS
from continual.measures import distances as measures
from continual.storage import records

E, A, B, H = (0.25, 0.25, 0.25, 0.25), (1, 0, 0, 0), (0, 1, 0, 0), (0.5, 0.5, 0, 0)
ZERO = (0,)


@dataclass(frozen=True)
class Case:
    """A run worked by hand.

    Attributes:
        scores: R, a row a stage, row 0 untrained.
        rows: Test rows of each task.
        joint: a*_k of each task.
        routes: Usage by stage, task and block.
        tokens: Mean entropy of a token's weights after the last stage, by task, in every block.
        halves: The split-half JS of each task, in every block and stage; KL's is twice that.
        general: Log-likelihood of untouched text, untrained and after the last stage.
        expected: Each key of summary.json.
    """

    scores: list[list[float]]
    rows: list[int]
    joint: list[float]
    routes: list[list[list[tuple[float, ...]]]]
    tokens: list[float]
    halves: list[float]
    general: tuple[float, float]
    expected: dict[str, float]


THREE = Case(
    scores=[[0.1, 0.2, 0.3], [0.8, 0.3, 0.3], [0.6, 0.9, 0.5], [0.7, 0.5, 0.6]],
    rows=[10, 20, 70],
    joint=[0.85, 0.9, 0.8],
    # Four atoms, two blocks; the second block never moves and serves all tasks alike, which halves every mean.
    routes=[[[E, A]] * 3, [[A, A], [E, A], [E, A]], [[H, A], [H, A], [E, A]], [[A, A], [H, A], [B, A]]],
    tokens=[0.0, 0.1, 0.0],
    halves=[0.001, 0.002, 0.006],
    general=(-2.0, -2.1),
    expected={
        "average_accuracy": 0.6,
        "micro_average_accuracy": 0.59,  # (7 + 10 + 42) / 100
        "backward_transfer": -0.25,  # (-0.1 - 0.4) / 2
        "forward_transfer": 0.15,  # (0.1 + 0.2) / 2
        "forgetting": 0.25,  # (0.1 + 0.4) / 2
        "intransigence": 0.2,
        "average_incremental_accuracy": 0.716667,  # (0.8 + 0.75 + 0.6) / 3
        "learning_accuracy": 0.766667,  # 2.3 / 3
        "routing_entropy_nats": 0.115525,  # ln 2 / 6
        "token_entropy_nats": 0.033333,
        "task_information_nats": 0.231049,  # (ln 2 - ln 2 / 3) / 2
        "token_information_nats": 0.082191,
        "route_drift": 0.071920,  # JS(A, H) = 0.215762 twice in three (stage, task), halved over blocks
        "route_drift_null": 0.001333,  # (0.001 + 0.001 + 0.002) / 3
        "route_drift_kl": 1.151288,  # (KL(H, A) = 6.214597 + KL(A, H) = 0.693131) / 3 / 2
        "route_drift_tv": 0.166667,
        "kl_separation": 3.453864,  # pairs A-H, H-B: 0.693131 and 6.214597; A-B: 13.815456 both ways
        "kl_separation_null": 0.006,
        "js_separation": 0.187445,  # (0.215762 + 0.693147 + 0.215762) / 3 / 2
        "js_separation_null": 0.003,
        "dead_atoms": 2,
        "general_ability_change": -0.05,
        "trainable_parameters": 123,
    },
)
FOUR = Case(  # the first task recovers beyond its own stage, the second peaks a stage late
    scores=[
        [0.0, 0.1, 0.2, 0.3],
        [0.9, 0.2, 0.2, 0.4],
        [0.5, 0.8, 0.1, 0.4],
        [0.7, 0.9, 0.6, 0.2],
        [1.0, 0.6, 0.6, 0.5],
    ],
    rows=[40, 30, 20, 10],
    joint=[0.9, 0.9, 0.7, 0.65],
    # Five atoms (the last is never used), one block.
    routes=[
        [[(*shares, *ZERO)] for shares in stage]
        for stage in ((E, E, E, E), (A, E, E, E), (A, B, E, E), (H, B, A, E), (A, B, H, H))
    ],
    tokens=[0.0, 0.0, 0.5, 0.3],
    halves=[0.001, 0.002, 0.003, 0.006],
    general=(-4.0, -3.9),
    expected={
        "average_accuracy": 0.675,
        "micro_average_accuracy": 0.75,  # (40 + 18 + 12 + 5) / 100
        "backward_transfer": -0.033333,  # (0.1 - 0.2 + 0) / 3
        "forward_transfer": -0.033333,  # (0.1 - 0.1 - 0.1) / 3
        "forgetting": 0.066667,  # (-0.1 + 0.3 + 0) / 3
        "intransigence": 0.15,
        "average_incremental_accuracy": 0.739583,  # (0.9 + 0.65 + 0.733333 + 0.675) / 4
        "learning_accuracy": 0.7,
        "routing_entropy_nats": 0.346574,  # ln 2 / 2
        "token_entropy_nats": 0.2,
        "task_information_nats": 0.346574,  # ln 2 - ln 2 / 2
        "token_information_nats": 0.146574,
        "route_drift": 0.107881,  # JS(A, H) three times in six
        "route_drift_null": 0.001667,  # (3 x 0.001 + 2 x 0.002 + 0.003) / 6
        "route_drift_kl": 2.187052,  # (6.214591 + 0.693130 + 6.214591) / 6
        "route_drift_tv": 0.25,
        "kl_separation": 4.605148,  # (2 x 13.815443 + 4 x 0.693130 + 4 x 6.214591) / 12
        "kl_separation_null": 0.006,
        "js_separation": 0.259366,  # (2 ln 2 + 8 x 0.215762) / 12
        "js_separation_null": 0.003,
        "dead_atoms": 3,
        "general_ability_change": 0.025,
        "trainable_parameters": 123,
    },
)


def run_of(case: Case, names: Sequence[str], directory: Path = Path("nowhere")) -> Run:
    """Return a finished run that recorded what ``case`` says, under these names of its tasks."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in records.SCHEMAS}
    for stage, task in np.ndindex(len(case.scores), len(names)):
        key = {"run": "by-hand", "seed": 7, "stage": stage, "task": names[task], "direction": "none"}
        score = {"metric": "accuracy", "value": case.scores[stage][task], "count": case.rows[task]}
        rows["scores"].append(key | score)
        for block, shares in enumerate(case.routes[stage][task]):
            place = key | {"block": block, "count": 9}
            usage = [place | {"metric": "usage", "atom": atom, "value": share} for atom, share in enumerate(shares)]
            rows["routing"] += usage
            rows["routing"].append(place | {"metric": "token_entropy_nats", "atom": -1, "value": case.tokens[task]})
    for stage, value in ((0, case.general[0]), (len(names), case.general[1])):
        key = {"run": "by-hand", "seed": 7, "stage": stage, "task": "general", "direction": "higher", "count": 9}
        rows["general"].append(key | {"metric": "log_likelihood_nats", "value": value})
    frames = {name: pd.DataFrame(rows[name], columns=schema.names) for name, schema in records.SCHEMAS.items()}
    facts = {"metric": "accuracy", "higher_is_better": True}
    manifest = {"run": "by-hand", "seed": 7, "stages": list(names), "finished_stage": len(names)}
    manifest |= {"tasks": dict.fromkeys(names, facts), "model": {"trainable_parameters": 123}}
    frames["separation"] = distances(case, names)
    ordered = {name: _ordered(frame, list(names)) for name, frame in frames.items()}
    return Run(directory, manifest, ordered)


def distances(case: Case, names: Sequence[str]) -> pd.DataFrame:
    """Return the table of separations: the pairs' from ``routing``, which has cases of its own, and the nulls."""
    rows = []
    for stage, task, other in np.ndindex(len(case.scores), len(names), len(names)):
        key = {"run": "by-hand", "seed": 7, "stage": stage, "task": names[task], "other": names[other]}
        for block in range(len(case.routes[0][0])):
            p, q = case.routes[stage][task][block], case.routes[stage][other][block]
            pairs = {"js": float(measures.js_divergence(p, q)), "kl": float(measures.kl_divergence(p, q))}
            halves = {"js_split_half": case.halves[task], "kl_split_half": 2 * case.halves[task]}
            for metric, value in (halves if task == other else pairs).items():
                place = {"block": block, "metric": metric, "direction": "none", "value": value, "count": 9}
                rows.append(key | place)
    return pd.DataFrame(rows, columns=records.SCHEMAS["separation"].names)


@pytest.mark.parametrize("case", [THREE, FOUR], ids=["3x3", "4x4"])
def test_every_number_of_a_summary_worked_by_hand(case: Case) -> None:
    found = summarise(run_of(case, "abcd"[: len(case.rows)]), joint=case.joint)
    assert set(case.expected) == set(KEYS)
    assert found.values == pytest.approx(case.expected, abs=1.5e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=12), min_size=4, max_size=4, unique=True))
def test_no_number_depends_on_the_tasks_names(names: list[str]) -> None:
    """Whatever a task is called, and however the names sort."""
    assert summarise(run_of(FOUR, names), joint=FOUR.joint).values == pytest.approx(FOUR.expected, abs=1.5e-6)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 6))
def test_appended_unused_atoms_change_no_number_but_the_dead(extra: int) -> None:
    """KL's smoothing gives each atom its epsilon, so KL alone moves, by about M epsilon of itself."""
    routes = [[[(*shares, *(0,) * extra) for shares in task] for task in stage] for stage in FOUR.routes]
    wider = Case(**{**FOUR.__dict__, "routes": routes})
    found = summarise(run_of(wider, "abcd"), joint=FOUR.joint).values
    assert found["dead_atoms"] == FOUR.expected["dead_atoms"] + extra
    smoothed = ("kl_separation", "route_drift_kl")
    for key in set(KEYS) - {"dead_atoms", *smoothed}:
        assert found[key] == pytest.approx(FOUR.expected[key], abs=1.5e-6)
    for key in smoothed:
        assert found[key] == pytest.approx(FOUR.expected[key], rel=2 * extra * measures.EPSILON)


def test_usage_drift_by_hand() -> None:
    """U[s] - U[s-1], and U[s] minus U after the task's own stage, both over blocks."""
    usage = np.array(THREE.routes, dtype=float)
    names = ["a", "b", "c"]
    before = tables.usage_change(usage, names, "previous")
    first = before[(before["task"] == "a") & (before["stage"] == 2)]["value"].to_numpy()
    assert first == pytest.approx([-0.25, 0.25, 0, 0])  # A to H in one block of two
    since = tables.usage_change(usage, names, "trained")
    assert set(zip(since["task"], since["stage"], strict=True)) == {("a", 2), ("a", 3), ("b", 3)}
    back = since[(since["task"] == "a") & (since["stage"] == 3)]["value"].to_numpy()
    assert back == pytest.approx([0, 0, 0, 0])
    wide = tables.usage_change(np.array(FOUR.routes, dtype=float), list("abcd"), "trained")
    late = wide[(wide["task"] == "c") & (wide["stage"] == 4)]["value"].to_numpy()
    assert late == pytest.approx([-0.5, 0.5, 0, 0, 0])


def test_atom_entropy_of_three_and_four_tasks_by_hand() -> None:
    three = routing.atom_entropy([[0.6, 0.4, 0.0], [0.3, 0.0, 0.7], [0.3, 0.4, 0.3]])
    # Shares of the atoms: (1/2, 1/4, 1/4), (1/2, 0, 1/2), (0, 0.7, 0.3); 1.039721, 0.693147, 0.610864 over ln 3
    assert three == pytest.approx([0.946395, 0.630930, 0.556033], abs=1e-6)
    four = routing.atom_entropy([[0.25, 0.75, 0, 0], [0.25, 0, 0.75, 0], [0.25, 0, 0.75, 0], [0.25, 0.75, 0, 0]])
    assert four == pytest.approx([1, 0.5, 0.5, np.nan], abs=1e-6, nan_ok=True)


def test_separation_matrix_of_four_tasks_by_hand() -> None:
    usage = np.array([[A], [B], [H], [E]], dtype=float)
    # JS(A, H) = 0.215762; JS(H, E) = 0.215762 too; JS(A, E) = (ln 1.6 + 0.25 ln 0.4 + 0.75 ln 2) / 2 = 0.380396
    expected = [[0, 0.693147, 0.215762, 0.380396], [0.693147, 0, 0.215762, 0.380396]]
    expected += [[0.215762, 0.215762, 0, 0.215762], [0.380396, 0.380396, 0.215762, 0]]
    assert routing.pairwise(usage) == pytest.approx(np.array(expected), abs=1e-6)
    shared = 1 - routing.pairwise(usage, measures.total_variation)
    assert shared == pytest.approx(
        np.array([[1, 0, 0.5, 0.25], [0, 1, 0.5, 0.25], [0.5, 0.5, 1, 0.5], [0.25, 0.25, 0.5, 1]])
    )


def test_smallest_difference_by_hand() -> None:
    assert intervals.smallest_difference(100) == pytest.approx(0.138593, abs=1e-6)
    assert intervals.smallest_difference(400) == pytest.approx(0.069296, abs=1e-6)
    with pytest.raises(ValueError, match="at least 1"):
        intervals.smallest_difference(0)


# ---- what is known to be wrong elsewhere


def test_forgetting_is_neither_first_minus_last_nor_last_minus_first() -> None:
    """The second task was best a stage after its own: what was lost since its own stage is less than what was lost."""
    since_own = [0.9 - 1.0, 0.8 - 0.6, 0.6 - 0.6]
    assert forgetting.forgetting_by_task(FOUR.scores) == pytest.approx([-0.1, 0.3, 0.0])
    assert forgetting.forgetting(FOUR.scores) != pytest.approx(sum(since_own) / 3)
    assert forgetting.backward_transfer(FOUR.scores) == pytest.approx(-sum(since_own) / 3)


def test_a_maximum_over_the_final_row_would_hide_improvement() -> None:
    hidden = [1.0 - 1.0, 0.9 - 0.6, 0.6 - 0.6]
    assert sum(hidden) / 3 == pytest.approx(0.1)
    assert forgetting.forgetting(FOUR.scores) == pytest.approx(0.066667, abs=1e-6)
    grows = [[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [0.6, 0.5, 0.0], [0.8, 0.9, 0.5]]
    assert forgetting.forgetting(grows) == pytest.approx(-0.3)  # (-0.2 - 0.4) / 2


def test_a_maximum_over_the_untrained_row_would_count_what_was_never_learnt() -> None:
    knew = [[0.9, 0.9, 0.9], [0.4, 0.5, 0.5], [0.4, 0.6, 0.5], [0.4, 0.6, 0.7]]
    assert forgetting.forgetting(knew) == pytest.approx(0.0)


@pytest.mark.parametrize(
    "measure",
    [
        forgetting.average_accuracy,
        forgetting.learning_accuracy,
        forgetting.average_incremental_accuracy,
        forgetting.backward_transfer,
        forgetting.forward_transfer,
        forgetting.forgetting,
        forgetting.forgetting_by_task,
        lambda scores: forgetting.intransigence(scores, [0.5, 0.5, 0.5]),
    ],
)
def test_the_callers_lists_stay_as_they_were_and_are_never_padded(measure: Any) -> None:
    scores = copy.deepcopy(THREE.scores)
    measure(scores)
    assert scores == THREE.scores
    ragged = [row[: max(stage, 1)] for stage, row in enumerate(THREE.scores)]  # stages that scored the seen tasks only
    kept = copy.deepcopy(ragged)
    with pytest.raises(ValueError):
        measure(ragged)
    assert ragged == kept


def test_micro_mean_needs_rows_of_every_task() -> None:
    assert forgetting.micro_average_accuracy([1.0, 0.0], [3, 1]) == 0.75
    assert np.isnan(forgetting.micro_average_accuracy([1.0, 0.5], [3, np.nan]))
    for final, rows in (([1.0], [3, 1]), ([1.0, 0.5], [3, 0]), ([[1.0]], [[1]])):
        with pytest.raises(ValueError, match="row counts"):
            forgetting.micro_average_accuracy(final, rows)


# ---- properties of any matrix and any routes

shares = st.floats(0, 1)
matrices = st.integers(2, 6).flatmap(
    lambda num: st.lists(st.lists(shares, min_size=num, max_size=num), min_size=num + 1, max_size=num + 1)
)


@given(matrices)
def test_the_final_mean_is_what_was_learnt_plus_what_came_after(scores: list[list[float]]) -> None:
    """ACC = LA + (T - 1) / T BWT."""
    num = len(scores[0])
    after = forgetting.learning_accuracy(scores) + (num - 1) / num * forgetting.backward_transfer(scores)
    assert forgetting.average_accuracy(scores) == pytest.approx(after, abs=1e-9)


@given(st.lists(st.tuples(shares, st.integers(1, 1000)), min_size=1, max_size=8), st.integers(1, 50))
def test_the_micro_mean_lies_among_the_scores(tasks: list[tuple[float, int]], times: int) -> None:
    final, rows = (list(side) for side in zip(*tasks, strict=True))
    micro = forgetting.micro_average_accuracy(final, rows)
    assert min(final) - 1e-9 <= micro <= max(final) + 1e-9
    assert forgetting.micro_average_accuracy(final, [times * num for num in rows]) == pytest.approx(micro, abs=1e-9)
    assert forgetting.micro_average_accuracy(final, [times] * len(final)) == pytest.approx(np.mean(final), abs=1e-9)


def sparse(data: st.DataObject, *leading: int, num_atoms: int) -> np.ndarray:
    """Draw usages as top-k routing leaves them: some atoms exactly 0."""
    weights = st.lists(st.integers(0, 9), min_size=num_atoms, max_size=num_atoms).filter(any)
    found = np.array([data.draw(weights) for _ in range(int(np.prod(leading)))], dtype=float)
    return (found / found.sum(axis=-1, keepdims=True)).reshape(*leading, num_atoms)


@given(st.data(), st.integers(1, 6))
def test_bounds_hold_where_atoms_are_not_used_at_all(data: st.DataObject, num_atoms: int) -> None:
    p, q = sparse(data, 2, num_atoms=num_atoms)
    js, tv, kl = (float(f(p, q)) for f in (measures.js_divergence, measures.total_variation, measures.kl_divergence))
    assert 0 <= js <= log(2) and 0 <= tv <= 1 + 1e-12 and 0 <= kl <= log((1 + num_atoms * 1e-6) / 1e-6)
    assert js <= tv * log(2) + 1e-9  # Lin 1991, theorem 3
    assert (1 - num_atoms * 1e-6) * tv**2 <= kl / 2 + 1e-5  # Pinsker
    assert all(float(f(p, p)) == pytest.approx(0, abs=1e-12) for f in (measures.js_divergence, measures.kl_divergence))
    assert 0 <= measures.entropy_nats(p) <= log(num_atoms) + 1e-9


@given(st.data(), st.integers(2, 5), st.integers(1, 4))
def test_information_has_its_bounds(data: st.DataObject, num_atoms: int, num_tokens: int) -> None:
    """A usage is the mean of its tokens' weights, so that its entropy is at least theirs."""
    tokens = sparse(data, 3, num_tokens, num_atoms=num_atoms)
    usage = tokens.mean(axis=1)
    within = routing.token_information_nats(measures.entropy_nats(usage), measures.entropy_nats(tokens).mean(axis=1))
    assert -1e-9 <= within <= log(num_atoms) + 1e-9
    among = routing.task_information_nats(usage[:, None])
    assert -1e-9 <= among <= min(log(3), log(num_atoms)) + 1e-9
    # The chain rule: I(atom; task, token) = I(atom; task) + I(atom; token | task)
    both = measures.entropy_nats(usage.mean(axis=0)) - measures.entropy_nats(tokens).mean()
    assert both == pytest.approx(among + within, abs=1e-9)
    same = np.repeat(tokens[:, :1], num_tokens, axis=1)  # routing that ignores the input
    whole, each = measures.entropy_nats(same.mean(axis=1)), measures.entropy_nats(same).mean(axis=1)
    assert routing.token_information_nats(whole, each) == pytest.approx(0, abs=1e-9)


@given(st.data(), st.integers(2, 5))
def test_atom_entropy_and_dead_atoms_have_their_bounds(data: st.DataObject, num_atoms: int) -> None:
    usage = sparse(data, 3, 1, num_atoms=num_atoms)
    entropy = routing.atom_entropy(usage)[0]
    used = usage[:, 0].sum(axis=0) > 0
    assert (np.isnan(entropy) == ~used).all()
    assert ((entropy[used] >= 0) & (entropy[used] <= 1 + 1e-9)).all()
    assert routing.dead_atoms(usage)[~used].all() and not routing.dead_atoms(usage).all()


@given(st.data())
def test_routes_that_stay_do_not_drift(data: st.DataObject) -> None:
    usage = np.repeat(sparse(data, 1, 3, 2, num_atoms=4), 4, axis=0)
    for distance in (measures.js_divergence, measures.kl_divergence, measures.total_variation):
        assert routing.route_drift(routing.drift(usage, distance)) == pytest.approx(0, abs=1e-12)
