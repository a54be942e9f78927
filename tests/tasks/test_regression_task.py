"""Regression tasks: the functions against values worked by hand, and rows that keep to their contract."""

import math

import numpy as np
import pytest

from tasks import RegressionTask, TaskError
from tasks.functions import FUNCTIONS
from tasks.regression import moments

# The domains' midpoints, put into the published formulas with plain math, each number written out.
_RW, _R, _TU, _LOG = 0.1, 25050.0, 89335.0, math.log(25050.0 / 0.1)
_GAIN = 175 * (0.725 + 9)
_VB1 = 12 * 47.5 / (100 + 47.5)
_A = 100000 * 0.0125 + 19.62 * 45 - 3000 * 0.006 / 0.0125
_V = 0.0125 / (2 * 3000) * (math.sqrt(_A**2 + 4 * 3000 * (100000 * 0.006 / 350) * 293) - _A)
MIDPOINTS = {
    "friedman": 10 * math.sin(math.pi / 4) + 0 + 5 + 2.5,
    "borehole": 2
    * math.pi
    * _TU
    * (1050 - 760)
    / (_LOG * (1 + 2 * 1400 * _TU / (_LOG * _RW**2 * 10950) + _TU / 89.55)),
    "otl_circuit": (
        (_VB1 + 0.74) * _GAIN / (_GAIN + 1.75)
        + 11.35 * 1.75 / (_GAIN + 1.75)
        + 0.74 * 1.75 * _GAIN / ((_GAIN + 1.75) * 1.85)
    ),
    "piston": 2 * math.pi * math.sqrt(45 / (3000 + 0.0125**2 * (100000 * 0.006 / 350) * 293 / _V**2)),
    "wing_weight": (
        0.036 * 175**0.758 * 260**0.0035 * 8**0.6 * 30.5**0.006 * 0.75**0.04 * 13**-0.3 * (4.25 * 2100) ** 0.49
        + 175 * 0.0525
    ),
    # Angles of pi each: the segments, 0.5 long, point left, right, left, right.
    "robot_arm": 0.0,
    "ishigami": 0.0,
    # |4/2 - 2| = 0, so factor i is a_i / (1 + a_i), and a_1 = 0.
    "sobol_g": 0.0,
}

# A second point of each, in natural units, away from the symmetries of the first.
POINTS: dict[str, tuple[list[float], float]] = {
    "friedman": ([0.5, 1.0, 0.0, 0.2, 0.4], 10 + 5 + 2 + 2),
    "borehole": (
        [0.15, 100, 63070, 1110, 63.1, 700, 1120, 12045],
        2
        * math.pi
        * 63070
        * 410
        / (math.log(100 / 0.15) + 2 * 1120 * 63070 / (0.15**2 * 12045) + math.log(100 / 0.15) * 63070 / 63.1),
    ),
    # Without Rf the circuit passes Vb1 + 0.74 on: 12 * 25 / 75 + 0.74.
    "otl_circuit": ([50, 25, 0, 2, 1, 100], 4.74),
    # V0 such that A = 0: then V^2 = S^2 P0 V0 Ta / (T0 k), the gas is as stiff as the spring: C = 2 pi sqrt(M / 2k).
    "piston": (
        [45, 0.0125, (1250 + 19.62 * 45) * 0.0125 / 3000, 3000, 100000, 293, 350],
        2 * math.pi * math.sqrt(45 / 6000),
    ),
    # The nominal wing of Forrester et al., a Cessna C172's.
    "wing_weight": (
        [174, 252, 7.52, 0, 34, 0.672, 0.12, 3.8, 2000, 0.064],
        0.036 * 174**0.758 * 252**0.0035 * 7.52**0.6 * 34**0.006 * 0.672**0.04 * 12**-0.3 * 7600**0.49 + 11.136,
    ),
    # Right, up (a quarter turn), left, down: lengths 1, 0.75, 0.5, 0.25 leave (0.5, 0.5).
    "robot_arm": ([0, math.pi / 2, math.pi / 2, math.pi / 2, 1, 0.75, 0.5, 0.25], math.sqrt(0.5)),
    "ishigami": ([math.pi / 2, math.pi / 2, 2], 1 + 7 + 1.6),
    # Factors (|4x - 2| + a) / (1 + a) at x = 0: (2 + a) / (1 + a) with a = 0, 1/2, ..., 7/2.
    "sobol_g": ([0.0] * 8, math.prod((2 + i / 2) / (1 + i / 2) for i in range(8))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_at_the_midpoint_of_their_domain(name: str) -> None:
    known = FUNCTIONS[name]
    value = known.on_unit_cube(np.full((1, known.num_inputs), 0.5))
    np.testing.assert_allclose(value, [MIDPOINTS[name]], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_at_a_second_point(name: str) -> None:
    point, expected = POINTS[name]
    np.testing.assert_allclose(FUNCTIONS[name].formula(np.array([point])), [expected], rtol=1e-9)


def test_moments_agree_with_the_published_closed_forms() -> None:
    # Ishigami & Homma, 1990: mean a/2, variance a^2/8 + b pi^4/5 + b^2 pi^8/18 + 1/2; Sobol', 1993: mean 1, variance
    # prod(1 + 1 / (3 (1 + a_i)^2)) - 1.
    ishigami_std = math.sqrt(49 / 8 + math.pi**4 / 50 + math.pi**8 / 1800 + 0.5)
    sobol_std = math.sqrt(math.prod(1 + 1 / (3 * (1 + i / 2) ** 2) for i in range(8)) - 1)
    np.testing.assert_allclose(moments("ishigami"), [3.5, ishigami_std], rtol=0.01)
    np.testing.assert_allclose(moments("sobol_g"), [1.0, sobol_std], rtol=0.02)
    # A robot arm's segments are independent and point anywhere: E[distance^2] = 4 E[L^2] = 4/3.
    mean, std = moments("robot_arm")
    assert mean**2 + std**2 == pytest.approx(4 / 3, rel=0.01)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows_hold_padded_inputs_and_standardised_targets(name: str) -> None:
    task = RegressionTask(name, train_rows=400, test_rows=600)
    train, test = (task.rows(split).with_format("numpy")[:] for split in ("train", "test"))
    own = FUNCTIONS[name].num_inputs
    assert train["x"].shape == (400, 10) and test["x"].shape == (600, 10)
    assert np.abs(test["x"]).max() <= 1 and np.all(test["x"][:, own:] == 0)
    mean, std = moments(name)
    exact = (FUNCTIONS[name].on_unit_cube((test["x"][:, :own].astype(float) + 1) / 2) - mean) / std
    np.testing.assert_allclose(test["y"], exact, atol=1e-4)
    assert abs(test["y"].mean()) < 0.2 and abs(test["y"].std() - 1) < 0.2
    assert test["row"].tolist() == list(range(600)) and train["row"].tolist() == list(range(600, 1000))
    assert not {row.tobytes() for row in train["x"]} & {row.tobytes() for row in test["x"]}


def test_noise_is_relative_to_the_functions_spread_and_only_in_training() -> None:
    clean, noisy = (RegressionTask("borehole", noise=noise, train_rows=4000) for noise in (0.0, 0.25))
    difference = np.array(noisy.rows("train")["y"][:]) - np.array(clean.rows("train")["y"][:])
    assert difference.std() == pytest.approx(0.25, rel=0.05)
    assert abs(difference.mean()) < 0.02
    assert noisy.rows("test").to_list() == clean.rows("test").to_list()
    assert noisy.rows("train")["x"][:] == clean.rows("train")["x"][:]


@pytest.mark.parametrize(("shift", "low", "high"), [(0.3, 0.3, 1.0), (-0.6, 0.0, 0.4), (0.0, 0.0, 1.0)])
def test_shift_moves_the_inputs_of_both_splits_within_the_domain(shift: float, low: float, high: float) -> None:
    task = RegressionTask("ishigami", shift=shift, num_inputs=3)
    for split in ("train", "test"):
        u = (np.array(task.rows(split)["x"][:]) + 1) / 2
        assert u.shape == (512, 3)
        assert low - 1e-6 <= u.min() < low + 0.02 and high - 0.02 < u.max() <= high + 1e-6


def test_more_training_rows_leave_the_test_rows_and_the_first_training_rows() -> None:
    small, large = (RegressionTask("piston", train_rows=rows, test_rows=50) for rows in (20, 80))
    assert small.rows("test").to_list() == large.rows("test").to_list()
    assert small.rows("train").to_list() == large.rows("train").to_list()[:20]


def test_seeds_and_functions_draw_their_own_inputs() -> None:
    drawn = [RegressionTask(name, seed=seed).rows("test")["x"][0][:5] for name in FUNCTIONS for seed in (0, 1)]
    assert len({tuple(x) for x in drawn}) == 2 * len(FUNCTIONS)


def test_the_instruction_describes_the_function_unless_given() -> None:
    assert "piston" in RegressionTask("piston").instruction
    assert RegressionTask("piston", instruction="Say it.").instruction == "Say it."
    assert RegressionTask("piston").constant_score() == 0.0


def test_text_answers_are_refused() -> None:
    with pytest.raises(TypeError, match="no text answers"):
        RegressionTask("piston").score_answer({}, "1.0")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"function": "fridman"}, "no regression function 'fridman'; did you mean 'friedman'?"),
        (
            {"function": "wing_weight", "num_inputs": 8},
            "num_inputs must be at least 10 for function 'wing_weight', got 8",
        ),
        ({"function": "piston", "noise": -0.1}, "noise must be at least 0 and finite, got -0.1"),
        ({"function": "piston", "noise": math.nan}, "noise must be at least 0 and finite, got nan"),
        ({"function": "piston", "shift": 1.0}, "shift must lie between -1 and 1"),
        ({"function": "piston", "train_rows": 0}, "train_rows must be at least 1, got 0"),
        ({"function": "piston", "test_rows": 1}, "test_rows must be at least 2 for R2, got 1"),
        ({"function": "piston", "seed": -3}, "seed must be at least 0, got -3"),
    ],
)
def test_refusals_are_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(TaskError) as caught:
        RegressionTask(**arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
