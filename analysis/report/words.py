"""The report's words: what each measure is called and means, and the verdict in a sentence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from analysis.figures.style import number
from analysis.runs.frames import Frame
from analysis.summaries.changes import task_changes
from analysis.summaries.summary import Summary, why_not_averaged


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
KEY_NUMBERS = (
    "average_accuracy",
    "learning_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "average_incremental_accuracy",
)
"""The measures of the first screen: those that have an interval in every run that recorded its answers."""

BOUND_MEANINGS = {
    "zero_shot": "the untrained model",
    "per_task": "an adapter a task, the right one taken: knows the task",
    "joint": "a fresh adapter on the rows of all stages so far",
    "per_instruction_lookup": "an adapter a stage, taken by the nearest instruction",
}


_UNITS = {"r2": "R²", "accuracy": "accuracy"}


def verdict(summary: Summary) -> str:
    """Return what the run shows, in a sentence; what was learnt or lost is told apart from chance by its interval."""
    run = summary.run
    if run.finished_stage < 1:
        return "No stage is finished yet" + (": only the untrained scores are in." if run.finished_stage == 0 else ".")
    if "scores" in run.problems:
        return "The scores cannot be read, so what was learnt cannot be judged."
    changes = task_changes(summary)
    parts = [_taught(changes), _lost(changes)]
    joined = ", and ".join(part for part in parts if part)
    ended = _ended(summary)
    return f"{joined}; {ended}" if joined else f"{ended[0].upper()}{ended[1:]}"


def _taught(changes: Frame) -> str:
    """Return how many tasks the run taught, as a clause; nothing where no interval says so."""
    known = changes["taught_low"].notna()
    if not known.all():
        return ""
    num, of = int((changes["taught_low"] > 0).sum()), len(changes)
    if not num:
        one = "the one task" if of == 1 else f"any of the {of} tasks"
        return f"No learning can be told from chance on {one}"
    return "The model learnt its one task" if of == 1 else f"The model learnt {_of(num, of)} tasks"


def _of(num: int, of: int) -> str:
    return ("both" if of == 2 else f"all {of}") if num == of else f"{num} of {of}"


def _lost(changes: Frame) -> str:
    """Return what later stages took, as a clause; nothing where no interval says so."""
    earlier = changes.iloc[:-1]
    if not len(earlier) or earlier["kept_low"].isna().any():
        return ""
    lost, gained = int((earlier["kept_high"] < 0).sum()), int((earlier["kept_low"] > 0).sum())
    num = len(earlier)
    which = "the earlier one" if num == 1 else f"the {num} earlier ones"
    if not lost:
        if not (changes["taught_low"] > 0).any():
            return ""
        return f"no loss on {which} can be told from chance" + (f" ({gained} gained since)" if gained else "")
    some = "lost ground on the earlier one" if num == 1 else f"lost ground on {_of(lost, num)} earlier ones"
    return some + (f" ({gained} gained)" if gained else "")


def _ended(summary: Summary) -> str:
    """Return where the run stands after its last finished stage, as a clause with its full stop."""
    run, final = summary.run, summary.values["average_accuracy"]
    metrics = {run.metric(task) for task in run.learnt}
    unit = _UNITS.get(str(next(iter(metrics))), "score") if len(metrics) == 1 else "score"
    if final is None:
        if why_not_averaged(run):
            return "the scores are on unlike scales and are not averaged."
        return "the average score is not known."
    span = _between(summary.intervals.get("average_accuracy"))
    start = float(summary.learnt_matrix[0].mean())
    came = f", from {number(start)} untrained" if np.isfinite(start) else ""
    stages = "one stage" if len(run.learnt) == 1 else f"{len(run.learnt)} stages"
    return f"after {stages} the average {unit} is {number(float(final))}{span}{came}."


def _between(span: tuple[float, float] | None) -> str:
    if span is None or not np.isfinite(span).all():
        return ""
    return f" ({number(span[0])} to {number(span[1])})"


def gloss(summary: Summary) -> str:
    """Return what the verdict rests on: the largest fall, what the words mean, and what the intervals do not hold."""
    run = summary.run
    if run.finished_stage < 1 or "scores" in run.problems:
        return ""
    if summary.drawn is None:
        why = summary.reasons.get("intervals")
        return f"There are no intervals ({why}), so nothing is called learnt or lost." if why else ""
    changes = task_changes(summary)
    told = "Learnt: just trained, a task scores above both the untrained model and the best constant answer. "
    parts = [told + "Lost: it ends below its just-trained score. Either is said only where the 95 % interval of the "]
    parts[0] += "difference leaves out 0."
    fallen = changes[changes["kept_high"] < 0]
    if len(fallen):
        worst = fallen.loc[fallen["kept"].idxmin()]
        span = _between((float(worst["kept_low"]), float(worst["kept_high"])))
        parts.insert(0, f"The largest fall is that of {worst['task']}: {number(float(worst['kept']))}{span}.")
    return " ".join([*parts, "Intervals redraw test rows; other seeds and stage orders would add to them."])
