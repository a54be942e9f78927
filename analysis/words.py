"""The report's words: what each measure is called and means, and the verdict in a sentence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis import forgetting
from analysis.plots.style import number
from analysis.summary import Summary, why_not_averaged


@dataclass(frozen=True)
class Measure:
    """A measure's name, the direction that is better, and its definition in one sentence."""

    name: str
    better: str
    definition: str


MEASURES: dict[str, Measure] = {
    "average_accuracy": Measure(
        "average accuracy", "higher", "Mean final score over the learnt tasks: (1/T) Σ R[T, j]."
    ),
    "micro_average_accuracy": Measure(
        "average accuracy over rows",
        "higher",
        "Micro mean: final scores of the learnt tasks weighted by their test rows.",
    ),
    "backward_transfer": Measure(
        "backward transfer",
        "higher",
        "Mean of final minus just-trained score, last task left out; negative means forgetting.",
    ),
    "forward_transfer": Measure(
        "forward transfer",
        "higher",
        "Mean score just before a task's own stage minus its untrained score, first task left out.",
    ),
    "forgetting": Measure(
        "forgetting", "lower", "Mean of the best score after an earlier stage (untrained left out) minus the final one."
    ),
    "intransigence": Measure(
        "intransigence", "lower", "Score of a jointly trained model minus the just-trained score."
    ),
    "average_incremental_accuracy": Measure(
        "average incremental accuracy", "higher", "Mean over stages of the mean score on the tasks learnt so far."
    ),
    "learning_accuracy": Measure("learning accuracy", "higher", "Mean score just after training: (1/T) Σ R[j, j]."),
    "routing_entropy_nats": Measure(
        "routing entropy (nats)",
        "–",
        "Entropy of a task's atom usage after the last stage; mean over blocks and learnt tasks.",
    ),
    "token_entropy_nats": Measure(
        "entropy of a token's weights (nats)",
        "–",
        "Mean entropy of a token's own mix of atoms after the last stage, over tokens, blocks and learnt tasks.",
    ),
    "task_information_nats": Measure(
        "I(atom; task) (nats)", "–", "What the task alone says of the atom, over an even mix of the learnt tasks."
    ),
    "token_information_nats": Measure(
        "I(atom; token | task) (nats)",
        "–",
        "What the input says of the atom once the task is known: routing entropy minus a token's.",
    ),
    "route_drift": Measure(
        "route drift (nats)",
        "–",
        "JS of a learnt task's usage against the stage before; mean over blocks, tasks and stages.",
    ),
    "route_drift_null": Measure(
        "route drift, split-half null", "–", "The same JS between two halves of a task's rows, routes unmoved."
    ),
    "route_drift_kl": Measure("route drift in KL (nats)", "–", "Route drift with KL(now ‖ before) in the place of JS."),
    "route_drift_tv": Measure(
        "route drift in total variation", "–", "Route drift as the share of routing weight that changed atoms."
    ),
    "kl_separation": Measure(
        "KL separation (nats)",
        "–",
        "Mean KL between two learnt tasks' usages after the last stage, over blocks and pairs.",
    ),
    "kl_separation_null": Measure(
        "KL separation, split-half null", "–", "The same KL between two halves of one task's rows; mean over tasks."
    ),
    "js_separation": Measure("JS separation (nats)", "–", "KL separation with JS, at most ln 2, in the place of KL."),
    "js_separation_null": Measure(
        "JS separation, split-half null", "–", "The same JS between two halves of one task's rows; mean over tasks."
    ),
    "dead_atoms": Measure(
        "dead atoms", "lower", "Atoms with usage below 1/(10 M) for every learnt task in every block."
    ),
    "general_ability_change": Measure(
        "change of general ability",
        "higher",
        "Log-likelihood a token of untouched text against stage 0, relative; negative means ability lost.",
    ),
    "trainable_parameters": Measure("trainable parameters", "–", "Numbers that training may change."),
}
KEY_NUMBERS = ("average_accuracy", "learning_accuracy", "forgetting", "backward_transfer", "forward_transfer")
LEARNT_BY = 0.10
"""By how much a just-trained score must beat both the untrained score and the best constant answer."""

BOUND_MEANINGS = {
    "zero_shot": "the untrained model",
    "per_task": "an adapter a task, the right one taken: knows the task",
    "joint": "a fresh adapter on the rows of all stages so far",
    "per_instruction_lookup": "an adapter a stage, taken by the nearest instruction",
}


def key_numbers(summary: Summary) -> list[str]:
    """Return the six measures of the first screen: route drift is one of them where there are routes."""
    sixth = "route_drift" if summary.values.get("dead_atoms") is not None else "average_incremental_accuracy"
    return [*KEY_NUMBERS, sixth]


def verdict(summary: Summary) -> str:
    """Return what the run shows, in a sentence or two."""
    run = summary.run
    if run.finished_stage < 1:
        return "No stage is finished yet" + (": only the untrained scores are in." if run.finished_stage == 0 else ".")
    if "scores" in run.problems:
        return "The scores cannot be read, so what was learnt cannot be judged."
    parts = [_level(summary), _kept(summary), _learnt(summary)]
    return " ".join(part for part in parts if part)


def _stages(num: int) -> str:
    return "one stage" if num == 1 else f"{num} stages"


def _level(summary: Summary) -> str:
    num, final = len(summary.run.learnt), summary.values["average_accuracy"]
    metrics = {summary.run.metric(task) for task in summary.run.learnt}
    unit = "R²" if metrics == {"r2"} else "accuracy" if metrics == {"accuracy"} else "score"
    if final is None:
        scores = summary.learnt_matrix
        better = int((scores[-1] > scores[0]).sum())
        why = "; their scores are on unlike scales and are not averaged" if why_not_averaged(summary.run) else ""
        return f"After {_stages(num)}, {better} of {num} learnt tasks score above the untrained model{why}."
    start = float(summary.learnt_matrix[0].mean())
    came = f", from {number(start)} untrained" if np.isfinite(start) else ""
    return f"After {_stages(num)} the model reaches an average {unit} of {number(final)} on what it learnt{came}."


def _kept(summary: Summary) -> str:
    transfer, span = summary.values["backward_transfer"], summary.intervals.get("backward_transfer")
    if transfer is None:
        return ""
    if span and span[0] <= 0 <= span[1]:
        return "What it learnt first it kept: the change since lies within the chance of the test rows."
    change = f"{number(abs(float(transfer)))} on average"
    if transfer >= 0:
        return f"What it learnt first improved since, by {change}."
    scores = summary.learnt_matrix
    trained = forgetting.just_trained(scores)
    worst = int(np.argmax((trained - scores[-1])[:-1]))
    name = summary.run.learnt[worst]
    most = f"{name} ({number(trained[worst])} to {number(scores[-1, worst])})"
    return f"What it learnt first fell by {change}, most on {most}."


def _learnt(summary: Summary) -> str:
    run, scores = summary.run, summary.learnt_matrix
    constants = [(run.tasks.get(task) or {}).get("constant_score") for task in run.learnt]
    floor = np.maximum(scores[0], [np.nan if value is None else float(value) for value in constants])
    trained = forgetting.just_trained(scores)
    if np.isnan(floor + trained).any():
        return ""
    num = int((trained >= floor + LEARNT_BY - 1e-9).sum())
    tasks = "the one task was" if len(floor) == 1 else f"{num} of {len(floor)} tasks were"
    if len(floor) == 1 and not num:
        return (
            f"Just trained, the task does not beat the untrained model and the best constant answer by {LEARNT_BY:.2f}."
        )
    return f"Just trained, {tasks} {LEARNT_BY:.2f} or more above both the untrained model and the best constant answer."
