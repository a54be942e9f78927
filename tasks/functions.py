"""Non-linear test functions of simulation experiments, vectorised, each on its true domain.

Source: Surjanovic & Bingham, "Virtual Library of Simulation Experiments: Test Functions and Datasets", 2013,
https://www.sfu.ca/~ssurjano. Formulas, parameter values and domains are theirs; inputs are uniform on the domain here,
also where the library offers other distributions.

Shapes: z_Nd holds N points of d natural inputs; every formula returns N values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SimulationFunction:
    """A formula with its domain.

    Attributes:
        formula: From natural inputs (N, d) to values (N,).
        domain: (low, high) of each of the d inputs, in the natural units of the formula's docstring.
        sentence: What the function computes, in one sentence; the default instruction of its task.
    """

    formula: Callable[[Floats], Floats]
    domain: tuple[tuple[float, float], ...]
    sentence: str

    @property
    def num_inputs(self) -> int:
        """The number of inputs, d."""
        return len(self.domain)

    def on_unit_cube(self, u_Nd: Floats) -> Floats:
        """Evaluate at points of the unit cube, mapped linearly to the domain.

        Args:
            u_Nd: (N, d) in [0, 1].

        Returns:
            (N,) values in the function's natural unit.
        """
        low, high = np.array(self.domain).T
        return self.formula(low + u_Nd * (high - low))


def friedman(z_Nd: Floats) -> Floats:
    """Friedman (1991): 10 sin(pi x1 x2) + 20 (x3 - 0.5)^2 + 10 x4 + 5 x5 on [0, 1]^5."""
    x1, x2, x3, x4, x5 = z_Nd.T
    return 10 * np.sin(np.pi * x1 * x2) + 20 * (x3 - 0.5) ** 2 + 10 * x4 + 5 * x5


def borehole(z_Nd: Floats) -> Floats:
    """Water flow through a borehole in m3/yr (Harper & Gupta, 1983).

    2 pi Tu (Hu - Hl) / (ln(r/rw) (1 + 2 L Tu / (ln(r/rw) rw^2 Kw) + Tu/Tl)), with rw in [0.05, 0.15] m, r in
    [100, 50000] m, Tu in [63070, 115600] m2/yr, Hu in [990, 1110] m, Tl in [63.1, 116] m2/yr, Hl in [700, 820] m,
    L in [1120, 1680] m and Kw in [9855, 12045] m/yr.
    """
    rw, r, tu, hu, tl, hl, length, kw = z_Nd.T
    log_ratio = np.log(r / rw)
    return 2 * np.pi * tu * (hu - hl) / (log_ratio * (1 + 2 * length * tu / (log_ratio * rw**2 * kw) + tu / tl))


def otl_circuit(z_Nd: Floats) -> Floats:
    """Midpoint voltage of a transformerless push-pull circuit in V (Ben-Ari & Steinberg, 2007).

    With g = beta (Rc2 + 9) and Vb1 = 12 Rb2 / (Rb1 + Rb2):
    (Vb1 + 0.74) g / (g + Rf) + 11.35 Rf / (g + Rf) + 0.74 Rf g / ((g + Rf) Rc1), with Rb1 in [50, 150], Rb2 in
    [25, 70], Rf in [0.5, 3], Rc1 in [1.2, 2.5], Rc2 in [0.25, 1.2] kOhm and the gain beta in [50, 300].
    """
    rb1, rb2, rf, rc1, rc2, beta = z_Nd.T
    vb1 = 12 * rb2 / (rb1 + rb2)
    gain = beta * (rc2 + 9)
    return (vb1 + 0.74) * gain / (gain + rf) + 11.35 * rf / (gain + rf) + 0.74 * rf * gain / ((gain + rf) * rc1)


def piston(z_Nd: Floats) -> Floats:
    """Cycle time of a piston in s (Kenett & Zacks, 1998).

    2 pi sqrt(M / (k + S^2 (P0 V0/T0) Ta/V^2)), V = S/(2k) (sqrt(A^2 + 4 k (P0 V0/T0) Ta) - A),
    A = P0 S + 19.62 M - k V0/S, with M in [30, 60] kg, S in [0.005, 0.020] m2, V0 in [0.002, 0.010] m3, k in
    [1000, 5000] N/m, P0 in [90000, 110000] N/m2, Ta in [290, 296] K and T0 in [340, 360] K.
    """
    mass, area, v0, k, p0, ta, t0 = z_Nd.T
    a = p0 * area + 19.62 * mass - k * v0 / area
    volume = area / (2 * k) * (np.sqrt(a**2 + 4 * k * p0 * v0 / t0 * ta) - a)
    return 2 * np.pi * np.sqrt(mass / (k + area**2 * p0 * v0 / t0 * ta / volume**2))


def wing_weight(z_Nd: Floats) -> Floats:
    """Weight of a light aircraft's wing in lb (Forrester, Sobester & Keane, 2008).

    0.036 Sw^0.758 Wfw^0.0035 (A / cos^2 L)^0.6 q^0.006 lambda^0.04 (100 tc / cos L)^-0.3 (Nz Wdg)^0.49 + Sw Wp, with
    Sw in [150, 200] ft2, Wfw in [220, 300] lb, A in [6, 10], L in [-10, 10] degrees, q in [16, 45] lb/ft2, lambda in
    [0.5, 1], tc in [0.08, 0.18], Nz in [2.5, 6], Wdg in [1700, 2500] lb and Wp in [0.025, 0.08] lb/ft2.
    """
    sw, wfw, a, sweep_degrees, q, taper, tc, nz, wdg, wp = z_Nd.T
    cos = np.cos(np.deg2rad(sweep_degrees))
    shape = sw**0.758 * wfw**0.0035 * (a / cos**2) ** 0.6 * q**0.006 * taper**0.04 * (100 * tc / cos) ** -0.3
    return 0.036 * shape * (nz * wdg) ** 0.49 + sw * wp


def robot_arm(z_Nd: Floats) -> Floats:
    """Distance of a four-segment arm's end from its shoulder (An & Owen, 2001).

    sqrt(u^2 + v^2), u = sum_i L_i cos(theta_1 + ... + theta_i), v = sum_i L_i sin(theta_1 + ... + theta_i), with the
    angles theta_1..4 in [0, 2 pi] and the lengths L_1..4 in [0, 1].
    """
    angles = np.cumsum(z_Nd[:, :4], axis=1)
    lengths = z_Nd[:, 4:]
    return np.hypot((lengths * np.cos(angles)).sum(axis=1), (lengths * np.sin(angles)).sum(axis=1))


def ishigami(z_Nd: Floats) -> Floats:
    """Ishigami & Homma (1990): sin x1 + 7 sin^2 x2 + 0.1 x3^4 sin x1 on [-pi, pi]^3."""
    x1, x2, x3 = z_Nd.T
    return np.sin(x1) + 7 * np.sin(x2) ** 2 + 0.1 * x3**4 * np.sin(x1)


def sobol_g(z_Nd: Floats) -> Floats:
    """Sobol' g-function: prod_i (|4 x_i - 2| + a_i) / (1 + a_i) on [0, 1]^8, a_i = (i - 1) / 2 (Crestaux et al., 2007).

    The a_i are those of the library's code, which are at least 0 as the function demands; its page prints (i - 2) / 2.
    """
    a = np.arange(z_Nd.shape[1]) / 2
    return ((np.abs(4 * z_Nd - 2) + a) / (1 + a)).prod(axis=1)


_BOREHOLE = (
    (0.05, 0.15),
    (100.0, 50000.0),
    (63070.0, 115600.0),
    (990.0, 1110.0),
    (63.1, 116.0),
    (700.0, 820.0),
    (1120.0, 1680.0),
    (9855.0, 12045.0),
)
_OTL = ((50.0, 150.0), (25.0, 70.0), (0.5, 3.0), (1.2, 2.5), (0.25, 1.2), (50.0, 300.0))
_PISTON = (
    (30.0, 60.0),
    (0.005, 0.020),
    (0.002, 0.010),
    (1000.0, 5000.0),
    (90000.0, 110000.0),
    (290.0, 296.0),
    (340.0, 360.0),
)
_WING = (
    (150.0, 200.0),
    (220.0, 300.0),
    (6.0, 10.0),
    (-10.0, 10.0),
    (16.0, 45.0),
    (0.5, 1.0),
    (0.08, 0.18),
    (2.5, 6.0),
    (1700.0, 2500.0),
    (0.025, 0.08),
)
_UNIT, _TURN, _AROUND_ZERO = (0.0, 1.0), (0.0, 2 * np.pi), (-np.pi, np.pi)

FUNCTIONS: dict[str, SimulationFunction] = {
    "friedman": SimulationFunction(
        friedman, (_UNIT,) * 5, "Predict the Friedman function, a sine of a product plus a parabola and two lines."
    ),
    "borehole": SimulationFunction(
        borehole, _BOREHOLE, "Predict the flow of water through a borehole between two aquifers."
    ),
    "otl_circuit": SimulationFunction(
        otl_circuit, _OTL, "Predict the midpoint voltage of a transformerless push-pull circuit."
    ),
    "piston": SimulationFunction(piston, _PISTON, "Predict the cycle time of a piston moving in a cylinder of gas."),
    "wing_weight": SimulationFunction(
        wing_weight, _WING, "Predict the weight of a light aircraft's wing from its design."
    ),
    "robot_arm": SimulationFunction(
        robot_arm,
        (_TURN,) * 4 + (_UNIT,) * 4,
        "Predict how far the end of a four-segment robot arm is from its shoulder.",
    ),
    "ishigami": SimulationFunction(
        ishigami, (_AROUND_ZERO,) * 3, "Predict the Ishigami function of three periodic, interacting inputs."
    ),
    "sobol_g": SimulationFunction(
        sobol_g, (_UNIT,) * 8, "Predict the Sobol g-function, a product of folded inputs of falling weight."
    ),
}
