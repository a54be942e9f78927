"""The report's figures: each one function that takes tidy frames and returns a Figure, or for the studies its axes."""

from analysis.figures.routing import atom_usage, routing_entropy, specialists, usage_drift
from analysis.figures.scores import drift_against_loss, score_curves, score_matrix
from analysis.figures.separation import route_drift, separation_by_stage, separation_matrix, sharing
from analysis.figures.story import atoms_by_task, moves
from analysis.figures.studies import (
    bounds,
    concentration_by_epoch,
    contributions,
    learning_curves,
    norms_by_layer,
    pareto,
    stability,
)
from analysis.figures.sweeps import (
    accuracy_by_stage,
    differences_forest,
    mean_by_stage,
    methods_compared,
    scores_by_task,
)
from analysis.figures.training import general_ability, gradient_concentration, gradient_norms, training_loss

__all__ = [
    "accuracy_by_stage",
    "atom_usage",
    "atoms_by_task",
    "bounds",
    "concentration_by_epoch",
    "contributions",
    "differences_forest",
    "drift_against_loss",
    "general_ability",
    "gradient_concentration",
    "gradient_norms",
    "learning_curves",
    "mean_by_stage",
    "methods_compared",
    "moves",
    "norms_by_layer",
    "pareto",
    "route_drift",
    "routing_entropy",
    "score_curves",
    "score_matrix",
    "scores_by_task",
    "separation_by_stage",
    "separation_matrix",
    "sharing",
    "specialists",
    "stability",
    "training_loss",
    "usage_drift",
]
