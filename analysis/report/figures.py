"""Which figures a run's report has: each with its caption and alternative text, or why it cannot be drawn."""

from __future__ import annotations

import numpy as np

from analysis import figures
from analysis.figures.scores import score_name
from analysis.figures.style import number
from analysis.report.page import OPENING, Draw, ReportFigure, unless
from analysis.report.story_figures import story_figures
from analysis.report.study_training import bounds_figure
from analysis.runs import tables
from analysis.runs.load import Run
from analysis.summaries.changes import task_changes
from analysis.summaries.general import general_ability
from analysis.summaries.studies import largest_ratios
from analysis.summaries.summary import Summary, why_no_routes
from continual.measures.distances import EPSILON

_FRAMED = "The framed row is the stage that trained the task."
_KL = f"KL(p′ ‖ q′) with p′ = (p + ε) / (1 + M ε), ε = {EPSILON:g}"


def report_figures(summary: Summary) -> list[ReportFigure]:
    """Return the report's figures, in order."""
    run = summary.run
    return [
        *_scores(summary),
        *story_figures(summary),
        *_routes(summary),
        *_training(run),
        *_theory(run),
        *_general(run),
    ]


def _whose_atoms(run: Run) -> str:
    """Return what the numbers of a growing bank's atoms mean; nothing for a bank of one size."""
    if run.model.get("strategy") != "GrowingBank":
        return ""
    return f" Atom 0: no stage, the backbone as it is; then each slice's {run.model.get('num_atoms')} atoms, in turn."


def _scores(summary: Summary) -> list[ReportFigure]:
    run, scores = summary.run, summary.scores
    why = run.problems.get("scores") or ("" if len(scores) else "nothing is scored yet")
    name = score_name(scores)
    final = [number(value) for value in (summary.matrix[-1] if len(summary.matrix) else [])]
    finals = ", ".join(f"{task} {value or 'not scored'}" for task, value in zip(run.stages, final, strict=False))
    clipped = (
        " Red: R² under 0, worse than the mean; colours stop at −1, the numbers do not."
        if "r2" in set(scores["metric"])
        else ""
    )
    return [
        ReportFigure(
            "score_matrix",
            OPENING,
            "The score matrix",
            f"{name[0].upper()}{name[1:]} (higher is better) of every task after every stage; framed: just "
            "trained. Above a "
            f"frame the task was not trained yet; below it, later stages may have cost it something.{clipped}",
            f"Heat map of {name} by stage and task. Last row: {finals}.",
            *unless(why, lambda: figures.score_matrix(scores)),
            see=_steepest(summary),
        ),
        ReportFigure(
            "score_curves",
            "scores",
            "Scores by stage",
            "One panel a task, the others in grey. Vertical line: the stage that trained it. Dashed: the best constant "
            "answer. The last value is written out."
            + (" R² under −1 is drawn at −1, its value written." if clipped else ""),
            f"Line charts of {name} by stage, one a task. Final values: {finals}.",
            *unless(why, lambda: figures.score_curves(scores)),
        ),
    ]


def _steepest(summary: Summary) -> str:
    """Return which column of the score matrix falls most; only a fall whose interval leaves out 0 is called one."""
    changes = task_changes(summary).iloc[:-1] if summary.run.learnt else task_changes(summary)
    if not len(changes) or changes["kept_low"].isna().any():
        return ""
    fallen = changes[changes["kept_high"] < 0]
    if not len(fallen):
        return "No column falls below its frame by more than chance."
    index = fallen["kept"].idxmin()
    name = fallen.loc[index, "task"]
    column = summary.run.learnt.index(str(name))
    trained, final = summary.matrix[column + 1, column], summary.matrix[-1, column]
    return f"Steepest fall: {name}, from {number(float(trained))} just trained to {number(float(final))}."


def _routes(summary: Summary) -> list[ReportFigure]:
    run, usage = summary.run, tables.usage_array(summary.run)
    none = why_no_routes(run) if usage is None else ""
    array = np.zeros((1, len(run.stages), 1, 1)) if usage is None else usage
    return [*_use(run, array, none), *_distances(summary, array, none)]


def _use(run: Run, usage: np.ndarray, none: str) -> list[ReportFigure]:
    names, num_atoms, size = run.stages, usage.shape[-1], f"{len(run.stages)} tasks, {usage.shape[-1]} atoms"
    changes = {reference: tables.usage_change(usage, names, reference) for reference in ("previous", "trained")}
    apart = {
        key: "" if len(frame) else "no task's routes were recorded at both stages" for key, frame in changes.items()
    }
    first = none or (apart["previous"] if len(usage) > 1 else "no stage is finished, so nothing can have changed")
    late = "it needs a stage after the one that trained a task"
    since = none or (apart["trained"] if run.finished_stage > 1 else late)
    spread = none or ("" if len(names) > 1 else "a specialist is told from a shared atom by two tasks or more")
    change = "Red: used more; blue: used less; all panels share one scale."
    return [
        ReportFigure(
            "atom_usage",
            "use",
            "Atom usage by task after each stage (Fig. 6)",
            "Share of a task's routing weight that each atom gets, mean over its prompts' tokens and over "
            f"blocks. {_FRAMED}{_whose_atoms(run)}",
            f"Heat maps of atom usage by stage, one a task; {size}.",
            *unless(none, lambda: figures.atom_usage(tables.usage(usage, names))),
        ),
        ReportFigure(
            "usage_drift",
            "use",
            "Usage drift from stage to stage (Fig. 7)",
            f"U[s] − U[s−1] of each task, over blocks. {change} {_FRAMED}",
            f"Heat maps of the change of atom usage at each stage, one a task; {size}.",
            *unless(first, lambda: figures.usage_drift(changes["previous"])),
        ),
        ReportFigure(
            "usage_drift_since_trained",
            "use",
            "Usage drift since a task was trained (Fig. 7)",
            f"U[s] minus U after the stage that trained the task, over blocks. {change} Grey: not yet trained.",
            f"Heat maps of the change of atom usage since a task's own stage, one a task; {size}.",
            *unless(since, lambda: figures.usage_drift(changes["trained"], "since trained")),
        ),
        ReportFigure(
            "routing_entropy",
            "use",
            "Routing entropy (Fig. 8)",
            f"Entropy over atoms / ln M (M = {num_atoms}), over blocks: 1 = all atoms alike, 0 = one atom. Solid: "
            "of the "
            "task's mean usage; dashed: of a token's weights, on average. Between the two lies what the input decides.",
            "Line charts of normalised routing entropy by stage, one a task.",
            *unless(none, lambda: figures.routing_entropy(tables.entropies(run), num_atoms)),
        ),
        ReportFigure(
            "specialists",
            "use",
            "Specialists and shared atoms (Fig. 8)",
            f"After stage {max(run.finished_stage, 0)}. Atom entropy: of an atom's use over the tasks / ln T, "
            "mean over the "
            "blocks that use it. A dead atom has usage under 1/(10 M) for every task in every block.",
            f"Scatter of atom entropy against usage, over a heat map of each atom's mix of tasks; {size}.",
            *unless(spread, lambda: figures.specialists(tables.atoms(usage[-1], names))),
        ),
    ]


def _distances(summary: Summary, usage: np.ndarray, none: str) -> list[ReportFigure]:
    run, names = summary.run, summary.run.stages
    separation, drift = tables.separation(run), tables.drift(run)
    single = "" if len(names) > 1 else "one task has no other to be told from"
    apart = (why_no_routes(run, "separation") if separation.empty else "") or single
    still = "no stage is finished, so no route can have moved"
    moved = "" if len(drift) else why_no_routes(run, "drift") if separation.empty or "drift" in run.problems else still
    final = {metric: tables.separation_matrix(separation, run.finished_stage, metric) for metric in ("kl", "js")}
    alt = ", ".join(f"mean {metric.upper()} {number(_mean_apart(matrix))} nats" for metric, matrix in final.items())
    return [
        ReportFigure(
            "separation_matrix",
            "distance",
            "Task separation (Fig. 9)",
            f"How far apart the tasks' routes are, in nats, mean over blocks. {_KL}; JS is symmetric and at most "
            "ln 2 ≈ 0.69. Diagonal: the split-half null, the distance between two halves of the task's own rows.",
            f"Heat maps of KL and JS between tasks' routes after the last stage; {alt}.",
            *unless(apart, lambda: figures.separation_matrix(separation)),
            see=_apart(final["js"]),
        ),
        ReportFigure(
            "separation_by_stage",
            "distance",
            "How separation grew (Fig. 9)",
            "The KL matrix after each stage on one scale, tasks numbered by stage; written above: the mean off "
            f"the diagonal. {_FRAMED}",
            "Small heat maps of KL between tasks' routes, one a stage.",
            *unless(apart, lambda: figures.separation_by_stage(separation)),
        ),
        ReportFigure(
            "route_drift",
            "distance",
            "Stagewise route drift (Fig. 9)",
            "JS of a task's usage against the stage before, and against the stage that trained it, in nats, mean over "
            "blocks; root-spaced axis. Grey: the split-half null, two random halves of the same rows: a move "
            "inside it is "
            "not to be told from chance. Vertical line: the task's own stage.",
            "Line charts of route drift by stage, one a task, over the split-half null.",
            *unless(moved, lambda: figures.route_drift(drift)),
        ),
    ]


def _apart(js: np.ndarray) -> str:
    """Return how the distances between tasks compare with those between halves of one task."""
    null, between = float(np.mean(np.diag(js))), _mean_apart(js)
    if not (null > 0 and np.isfinite(between)):
        return ""
    return f"Two tasks are {between:.3f} nats of JS apart on average, two halves of one task {null:.3f}."


def _mean_apart(matrix: np.ndarray) -> float:
    off = matrix[~np.eye(len(matrix), dtype=bool)]
    return float(off.mean()) if off.size else float("nan")


def _training(run: Run) -> list[ReportFigure]:
    rows = run.tables["gradients"]
    recorded = set(rows["metric"])

    def if_recorded(metric: str, draw: Draw) -> tuple[Draw | None, str]:
        what = "no stage is finished" if run.finished_stage < 1 else f"the run recorded no {metric} rows"
        return unless("" if metric in recorded else run.problems.get("gradients", what), draw)

    return [
        ReportFigure(
            "training_loss",
            "training",
            "Training loss",
            "Every step faintly; the line is a running median over a twentieth of a stage's steps.",
            "Line chart of the training loss by step, stage after stage.",
            *if_recorded("train_loss", lambda: figures.training_loss(rows)),
        ),
        ReportFigure(
            "gradient_norms",
            "training",
            "Gradient norms by layer (Fig. 3)",
            "L2 norm of the gradient of each layer's A and B, mean over a stage's recorded steps, by depth; a "
            "panel a kind "
            "of layer, a line a stage. The shared bank has a panel of its own.",
            "Line charts of gradient norm by layer depth, one a kind of layer.",
            *if_recorded("grad_norm", lambda: figures.gradient_norms(rows)),
        ),
        ReportFigure(
            "gradient_concentration",
            "training",
            "Gradient concentration (Fig. 4)",
            "Largest norm over layers / mean norm, a step (dots) and the mean of an epoch (bars); 1 = spread evenly.",
            "Scatter of gradient concentration by step, with each epoch's mean.",
            *if_recorded("grad_concentration", lambda: figures.gradient_concentration(rows)),
        ),
    ]


def _theory(run: Run) -> list[ReportFigure]:
    """The theory's bounds are a figure only of runs that were asked to measure them."""
    ratios = largest_ratios(run.tables["theory"])
    return [bounds_figure(ratios, "training")] if len(ratios) else []


def _general(run: Run) -> list[ReportFigure]:
    """General ability is a figure only of runs that were asked to record it."""
    found = general_ability(run)
    if found.empty:
        return []
    return [
        ReportFigure(
            "general_ability",
            "general",
            "General ability by stage",
            "Relative change of the mean log-likelihood a token of untouched text against the untrained model (higher "
            "is better), no instruction given. Dashed: 1 % lost.",
            f"Line chart of the change of general ability by stage. Last value: {found['change'].iloc[-1]:.4f}.",
            *unless("", lambda: figures.general_ability(found)),
        )
    ]
