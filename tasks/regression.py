"""Regression of noisy non-linear functions, the cheap ground for continual learning of an MLP.

Source of the functions: Surjanovic & Bingham, https://www.sfu.ca/~ssurjano (see ``tasks.functions``).

Shapes: u_Nd are points of the unit cube, x_Nk model inputs in [-1, 1] padded with zeros to k columns.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.base import Split, Task, TaskError, check_counts, near_names
from tasks.functions import FUNCTIONS, Floats

if TYPE_CHECKING:
    from datasets import Dataset

WIDEST = max(function.num_inputs for function in FUNCTIONS.values())

_NUM_MOMENT_POINTS = 100_000
_MOMENT_SEED = 20131


@functools.cache
def moments(function: str) -> tuple[float, float]:
    """Return the noiseless mean and standard deviation of ``function`` on its whole domain, by fixed Monte Carlo.

    100000 points of a seed of their own: neither a task's rows nor its seed enter.
    """
    known = FUNCTIONS[function]
    y_N = known.on_unit_cube(np.random.default_rng(_MOMENT_SEED).random((_NUM_MOMENT_POINTS, known.num_inputs)))
    return float(y_N.mean()), float(y_N.std())


class RegressionTask(Task):
    """One test function as a task; its metric is R2, scored beside RMSE.

    Inputs are uniform on the function's domain and given as x = 2u - 1, u the point of the unit cube, padded with
    zeros so that all tasks of a run have the same width. Targets are standardised by the function's noiseless mean
    and standard deviation on its whole domain. Training targets carry Gaussian noise; test targets carry none, so the
    score says how well the function was learnt and its ceiling is R2 = 1 at every noise level.

    Args:
        function: One of friedman, borehole, otl_circuit, piston, wing_weight, robot_arm, ishigami, sobol_g.
        noise: Standard deviation of the training noise, in standard deviations of the function on its domain.
        shift: Covariate shift s of the task's inputs, train and test alike, in (-1, 1): the cube that u is drawn from
            is moved by s along every input and cut to the domain, u in [max(0, s), min(1, 1 + s)]. The function and
            the scale of y stay as they are.
        train_rows: Number of training rows. Changing it leaves the test rows as they are.
        test_rows: Number of test rows, at least 2 (R2 needs a spread).
        seed: Seed of inputs and noise, at least 0; another function draws other inputs from the same seed.
        num_inputs: Width of x, at least the function's own number of inputs; null for that of the widest function, 10.
        instruction: What to do; "" takes the function's own one-sentence description.

    Raises:
        TaskError: For an unknown function or an argument outside its range.
    """

    kind = "regression"

    def __init__(
        self,
        function: str,
        noise: float = 0.1,
        shift: float = 0.0,
        train_rows: int = 512,
        test_rows: int = 512,
        seed: int = 0,
        num_inputs: int | None = None,
        instruction: str = "",
    ) -> None:
        check_counts(seed, train_rows=train_rows, test_rows=test_rows)
        if function not in FUNCTIONS:
            near = near_names(function, FUNCTIONS)
            raise TaskError(f"no regression function {function!r}{near}; there are {', '.join(FUNCTIONS)}")
        own = FUNCTIONS[function].num_inputs
        if num_inputs is not None and num_inputs < own:
            raise TaskError(f"num_inputs must be at least {own} for function {function!r}, got {num_inputs}")
        if not 0 <= noise < float("inf"):
            raise TaskError(f"noise must be at least 0 and finite, got {noise}")
        if not -1 < shift < 1:
            raise TaskError(f"shift must lie between -1 and 1, both excluded, got {shift}")
        if test_rows < 2:
            raise TaskError(f"test_rows must be at least 2 for R2, got {test_rows}")
        self.function = function
        self.noise = noise
        self.shift = shift
        self.train_rows = train_rows
        self.test_rows = test_rows
        self.seed = seed
        self.num_inputs = WIDEST if num_inputs is None else num_inputs
        self.instruction = instruction or FUNCTIONS[function].sentence

    def score_answer(self, row: Mapping[str, Any], text: str) -> float:
        """Refuse: a regression is scored over all rows by R2 and RMSE, never answer by answer."""
        raise TypeError("a regression task has no text answers; score its predictions by R2 and RMSE over the rows")

    def _build(self) -> dict[Split, Dataset]:
        num_test, num_rows = self.test_rows, self.test_rows + self.train_rows
        # One stream row by row, test rows first: their number alone decides which they are.
        streams = np.random.SeedSequence([self.seed, zlib.crc32(self.function.encode())]).spawn(2)
        inputs, noises = (np.random.default_rng(stream) for stream in streams)
        low, high = max(0.0, self.shift), min(1.0, 1.0 + self.shift)
        u_Nd = low + (high - low) * inputs.random((num_rows, FUNCTIONS[self.function].num_inputs))
        mean, std = moments(self.function)
        y_N = (FUNCTIONS[self.function].on_unit_cube(u_Nd) - mean) / std
        y_N[num_test:] += self.noise * noises.standard_normal(self.train_rows)
        x_Nk = np.zeros((num_rows, self.num_inputs))
        x_Nk[:, : u_Nd.shape[1]] = 2 * u_Nd - 1
        return {"train": _table(x_Nk, y_N, num_test, num_rows), "test": _table(x_Nk, y_N, 0, num_test)}

    def _facts(self) -> dict[str, Any]:
        mean, std = moments(self.function)
        return {
            "function": self.function,
            "num_inputs": self.num_inputs,
            "noise": self.noise,
            "test_noise": 0.0,
            "shift": self.shift,
            "seed": self.seed,
            "target_mean": mean,
            "target_std": std,
        }


def _table(x_Nk: Floats, y_N: Floats, start: int, stop: int) -> Dataset:
    from datasets import Dataset, Features, List, Value

    features = Features({"x": List(Value("float32")), "y": Value("float32"), "row": Value("int64")})
    columns = {"x": x_Nk[start:stop].tolist(), "y": y_N[start:stop].tolist(), "row": list(range(start, stop))}
    return Dataset.from_dict(columns, features=features)
