"""The figures of a run's routing story: atoms, sharing, moves, and whether moves go with losses."""

from __future__ import annotations

import numpy as np

from analysis import figures
from analysis.figures.scores import correlation_text, score_name
from analysis.figures.style import number
from analysis.report.page import ReportFigure, unless
from analysis.runs import tables
from analysis.runs.frames import Frame
from analysis.summaries import intervals
from analysis.summaries.summary import Summary, why_no_routes

_SECTION = "story"


def story_figures(summary: Summary) -> list[ReportFigure]:
    """Return the figures of the routing story, in order."""
    run, usage = summary.run, tables.usage_array(summary.run)
    none = why_no_routes(run) if usage is None else ""
    array = np.zeros((1, len(run.stages), 1, 1)) if usage is None else usage
    drift = tables.drift(run)
    still = why_no_routes(run, "drift") if none or "drift" in run.problems else "no stage is finished"
    moved = "" if len(drift) else still
    return [_atoms(summary, array, none), _sharing(summary, array, none), *_moves(summary, drift, moved)]


def _atoms(summary: Summary, usage: np.ndarray, none: str) -> ReportFigure:
    run, num_atoms = summary.run, usage.shape[-1]
    mean = usage[-1].mean(axis=(0, 1))
    dead = summary.values.get("dead_atoms")
    see = ""
    if not none and not np.isnan(mean).any():
        see = f"Atom {int(mean.argmax())} carries the most weight over all tasks ({number(float(mean.max()))})"
        see += f"; {dead} of {num_atoms} atoms are dead." if dead is not None else "."
    return ReportFigure(
        "atoms_by_task",
        _SECTION,
        "Which atoms each task uses",
        "Share of each task's routing weight that an atom gets after the last finished stage, mean over blocks "
        "and over "
        "the prompts' tokens. A column that is strong in one row alone is a specialist; an even row uses every "
        "atom alike.",
        f"Heat map of atom usage by task; {len(run.stages)} tasks, {num_atoms} atoms.",
        *unless(none, lambda: figures.atoms_by_task(tables.usage(usage, run.stages))),
        see=see,
    )


def _sharing(summary: Summary, usage: np.ndarray, none: str) -> ReportFigure:
    names = summary.run.stages
    why = none or ("" if len(names) > 1 else "one task has no other to be told from")
    why = why or ("" if not np.isnan(usage[-1]).any() else "routes of a task were not recorded after the last stage")
    see = ""
    if not why:
        common = tables.sharing(usage[-1], names)
        pairs = common[common["task"].cat.codes < common["other"].cat.codes]
        nearest, farthest = pairs.loc[pairs["value"].idxmax()], pairs.loc[pairs["value"].idxmin()]
        see = (
            f"{nearest['task']} and {nearest['other']} share most ({number(nearest['value'])} of their routing weight)"
        )
        more = f", {farthest['task']} and {farthest['other']} least ({number(farthest['value'])})"
        see += (more if len(pairs) > 1 else "") + "."
    return ReportFigure(
        "sharing",
        _SECTION,
        "Who shares with whom",
        "Routing weight that two tasks put on the same atoms (1 − total variation, mean over blocks), tasks ordered by "
        "average-linkage clustering of their JS distance: branches that meet early share much.",
        f"Clustered heat map of the usage in common between {len(names)} tasks. {see}",
        *unless(why, lambda: figures.sharing(tables.sharing(usage[-1], names))),
        see=see,
    )


def _moves(summary: Summary, drift: Frame, moved: str) -> list[ReportFigure]:
    names = summary.run.stages
    pairs = tables.drift_and_loss(drift, summary.matrix)
    later = moved or ("" if len(pairs) else "it needs a scored stage after the one that trained a task")
    told = correlation_text(pairs)
    return [
        ReportFigure(
            "moves",
            _SECTION,
            "What moved at which stage",
            "How far a task's routes moved at each stage: JS against the stage before, over the JS between two random "
            "halves of the task's own rows. Around 1 a move is not to be told from chance. Framed: the task's "
            "own stage. Colours are logarithmic, from 1 on.",
            f"Heat map of route drift by task and stage; {len(names)} tasks.",
            *unless(moved, lambda: figures.moves(drift)),
            see="" if moved else _beyond(drift, names),
        ),
        ReportFigure(
            "drift_against_loss",
            _SECTION,
            "Does drift predict forgetting?",
            "One point a learnt task and later stage: how far its routes moved at that stage, and the score it lost "
            "there. The interval redraws points; points of one task are not independent, so it is rough.",
            f"Scatter of score lost against route drift. {told}.",
            *unless(later, lambda: figures.drift_against_loss(pairs, score_name(summary.scores))),
            see="" if later else _prediction(pairs),
        ),
    ]


def _beyond(drift: Frame, names: list[str]) -> str:
    """Return how many moves of learnt tasks are larger than the distance between two halves of their own rows."""
    js = drift[(drift["metric"] == "js") & (drift["reference"] == "previous")].dropna(subset=["value", "null"])
    own = {name: index + 1 for index, name in enumerate(names)}
    later = js[[stage > own[str(task)] for stage, task in zip(js["stage"], js["task"], strict=True)]]
    if not len(later):
        return ""
    beyond = int((later["value"] > later["null"]).sum())
    return f"{beyond} of {len(later)} moves of tasks already learnt are larger than their split-half null."


def _prediction(pairs: Frame) -> str:
    """Return whether drift goes with loss, as far as the interval of their correlation says so."""
    span = intervals.correlation_interval(pairs["value"], pairs["lost"])
    if span is None:
        return "Too few points to say."
    if span[0] <= 0 <= span[1]:
        return "Not shown: the interval of the correlation holds 0."
    more = "more" if span[0] > 0 else "less"
    return f"Here it does: tasks lost {more} where their routes moved further."
