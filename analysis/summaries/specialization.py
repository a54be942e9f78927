"""What the atoms of a run's bank are for, as tables: each function takes tidy frames of one run and returns one.

Frames come from ``analysis.runs.load``; ``analysis.figures.specialization`` draws them. Where a
function says nothing of a stage it is about the last one recorded, and of a run without what it needs it returns an
empty frame. Usages, entropies and distances are computed per block first and then averaged (``measures.routing``).
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.measures import routing as measures
from analysis.runs.frames import Frame
from analysis.runs.load import NO_SLICE, Frames, Run
from analysis.summaries.summary import why_no_routes
from continual.measures import distances

Array = NDArray[np.float64]

NUM_DRAWS = 1000
_HEADLINES = ("accuracy", "score", "r2")
_FEW = 2.0  # tokens that a token's weight is shrunk by towards the usual one: a token seen once proves little


def overview(frames: Frames) -> Frame:
    """Return, for each part of the story, how many rows the run recorded and, where there are none, why."""
    run = one_run(frames)
    why = why_no_routes(run) if not len(frames.routing) else ""
    not_recorded = why or "none were recorded (token_sample: 0, rows of numbers, or a run of an earlier version)"
    not_removed = why or f"no atom was taken out yet: python -m continual.ablate {run.directory}"
    parts = {
        "usage and entropy": (frames.routing, "routing", why),
        "drift": (frames.drift, "drift", why or "one stage alone was scored, and nothing has moved yet"),
        "tokens": (frames.tokens, "tokens", not_recorded),
        "atoms taken out": (frames.ablation, "ablation", not_removed),
    }
    rows = {
        part: {"rows": len(table), "note": run.problems.get(name) or ("" if len(table) else note)}
        for part, (table, name, note) in parts.items()
    }
    state = "finished" if run.complete else f"stage {max(run.finished_stage, 0)} of {len(run.stages)} finished"
    rows = {"run": {"rows": len(frames.scores), "note": f"{run.name}, {state}"}} | rows
    return pd.DataFrame.from_dict(rows, orient="index")


def one_run(frames: Frames) -> Run:
    """Return the run of ``frames``, or raise ValueError where they are several runs'."""
    if len(frames.runs) != 1:
        names = ", ".join(run.directory.name for run in frames.runs)
        raise ValueError(f"atoms of different runs have nothing in common: load one of {names}")
    return frames.runs[0]


# -- usage ------------------------------------------------------------------------------------------------------------


def usage(routing: Frame, stage: int | None = None) -> Frame:
    """Return usage over blocks after a stage: a row a task, a column an atom; rows sum to 1."""
    rows = _usage_rows(routing, stage)
    if rows.empty:
        return pd.DataFrame()
    return _wide(rows, "name").fillna(0.0)


def atoms(routing: Frame) -> Frame:
    """Return what each atom is used for: its usage, its entropy over tasks, and the task that uses it most.

    Columns usage (mean over tasks), entropy (over tasks / ln T: 0 one task's alone, 1 shared by all alike; missing with
    one task), task and share (of the atom's use), dead (usage below 1 / (10 M) for every task).
    """
    array, tasks, names = usage_array(routing)
    if not len(names):
        return pd.DataFrame(columns=["usage", "entropy", "task", "share", "dead"])
    mean = array.mean(axis=1)
    total = mean.sum(axis=0)
    share = np.divide(mean, total, out=np.full_like(mean, np.nan), where=total > 0)
    per_block = measures.atom_entropy(array)
    known = ~np.isnan(per_block)
    entropy = np.where(known, per_block, 0.0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)
    most = np.where(np.isnan(share).all(axis=0), -1, np.nan_to_num(share).argmax(axis=0))
    frame = pd.DataFrame(
        {
            "usage": mean.mean(axis=0),
            "entropy": entropy,
            "task": [tasks[index] if index >= 0 else "" for index in most],
            "share": np.nan_to_num(share).max(axis=0),
            "dead": measures.dead_atoms(array),
        },
        index=pd.Index(names, name="atom"),
    )
    return frame.drop(index=NO_SLICE, errors="ignore")


def entropies(routing: Frame, metric: str = "usage_entropy_nats") -> Frame:
    """Return routing entropy / ln M over blocks: a row a task, a column a stage.

    Args:
        routing: The table routing.
        metric: "usage_entropy_nats", of a task's usage; "token_entropy_nats", the mean of its tokens'.
    """
    used = routing[(routing["metric"] == "usage") & (routing["block"] >= 0)]
    rows = routing[(routing["metric"] == metric) & (routing["block"] >= 0)]
    if rows.empty or used.empty:
        return pd.DataFrame()
    most = used.groupby("stage")["atom"].max() + 1  # atoms at hand: a growing bank has more after each stage
    scale = np.log(np.maximum(rows["stage"].map(most), 2))
    return _wide(rows.assign(value=rows["value"] / scale), "stage")


def sharing(routing: Frame) -> Frame:
    """Return what each pair of tasks has in common, most first: columns common (1 - TV), js (nats), atoms.

    ``atoms`` names the atoms through which they share, those that carry most of what is common.
    """
    array, tasks, names = usage_array(routing)
    rows = []
    for first in range(len(tasks)):
        for second in range(first + 1, len(tasks)):
            both = np.minimum(array[first], array[second]).mean(axis=0)
            through = [names[atom] for atom in np.argsort(-both, kind="stable")[:3] if both[atom] > 0]
            js = float(distances.js_divergence(array[first], array[second]).mean())
            rows.append((tasks[first], tasks[second], float(both.sum()), js, ", ".join(through)))
    frame = pd.DataFrame(rows, columns=["task", "other", "common", "js", "atoms"])
    return frame.sort_values("common", ascending=False, ignore_index=True)


def drift(drift_rows: Frame, reference: str = "previous") -> Frame:
    """Return how far each task's routes moved, JS in nats over blocks: a row a task, a column a stage.

    Args:
        drift_rows: The table drift.
        reference: "previous", from the stage before; "trained", from the stage that trained the task.
    """
    rows = drift_rows[(drift_rows["metric"] == "js") & (drift_rows["reference"] == reference)]
    rows = rows[rows["block"] >= 0]
    return pd.DataFrame() if rows.empty else _wide(rows, "stage")


def usage_array(routing: Frame) -> tuple[Array, list[str], list[str]]:
    """Return usage after the last stage, (T, N, M), and the tasks and atoms that it is of."""
    rows = _usage_rows(routing, None)
    if rows.empty:
        return np.zeros((0, 0, 0)), [], []
    wide = rows.pivot_table(index=["task", "block"], columns="name", values="value", observed=True).fillna(0.0)
    tasks = [str(task) for task in wide.index.get_level_values("task").unique()]
    return wide.to_numpy().reshape(len(tasks), -1, wide.shape[1]), tasks, [str(name) for name in wide.columns]


def _usage_rows(routing: Frame, stage: int | None) -> Frame:
    rows = routing[(routing["metric"] == "usage") & (routing["block"] >= 0)]
    return rows[rows["stage"] == (rows["stage"].max() if stage is None else stage)]


def _wide(rows: Frame, columns: str) -> Frame:
    """Return means over blocks: a row a task, in the order of training."""
    frame = rows.pivot_table(index="task", columns=columns, values="value", observed=True)
    frame.columns = [str(name) if columns == "name" else int(name) for name in frame.columns]
    frame.index = pd.Index([str(task) for task in frame.index], name="task")
    return frame.rename_axis(columns="atom" if columns == "name" else "stage")


# -- tokens -----------------------------------------------------------------------------------------------------------


def token_weights(tokens: Frame) -> Frame:
    """Return how much of each token's routing an atom gets, over blocks, most telling first within an atom.

    The latest sample of each task is read. Columns atom, token (blanks made visible), count (of it in the sample),
    weight (its mean), usual (the atom's mean over all tokens), tasks; ``lift`` orders: weight less usual, drawn towards
    0 where the token was seen a few times only.
    """
    columns = ["atom", "token", "count", "weight", "usual", "lift", "tasks"]
    latest = tokens[tokens["stage"] == tokens.groupby("task", observed=True)["stage"].transform("max")]
    if latest.empty:
        return pd.DataFrame(columns=columns)
    one = latest.assign(token=latest["token"].map(visible), task=latest["task"].astype(str))
    num_blocks = one["block"].nunique()
    seen = one.drop_duplicates(["task", "row", "place"])
    by_token = seen.groupby("token").agg(
        count=("place", "size"), tasks=("task", lambda names: ", ".join(dict.fromkeys(names)))
    )
    weight = one.groupby(["name", "token"], observed=True)["value"].sum() / num_blocks
    frame = weight.rename("sum").reset_index().merge(by_token, on="token")
    frame["usual"] = frame.groupby("name", observed=True)["sum"].transform("sum") / len(seen)
    frame["weight"] = frame["sum"] / frame["count"]
    frame["lift"] = (frame["sum"] - frame["count"] * frame["usual"]) / (frame["count"] + _FEW)
    frame = frame.sort_values(["name", "lift"], ascending=[True, False], ignore_index=True)
    return frame.assign(atom=frame["name"].astype(str))[columns]


def top_tokens(tokens: Frame, num: int = 6) -> Frame:
    """Return the tokens that each atom fires on: a row an atom, ``TOKEN WEIGHT xCOUNT`` in the cells."""
    weights = token_weights(tokens)
    best = weights[weights["lift"] > 0].groupby("atom", sort=False).head(num)
    rows = {}
    for atom, own in best.groupby("atom", sort=False):
        said = [f"{row.token} {row.weight:.2f} x{row.count}" for row in own.itertuples(index=False, name="Row")]
        rows[atom] = [f"{own['usual'].iloc[0]:.2f}", *said, *[""] * (num - len(said))]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["usual", *map(str, range(1, num + 1))])
    return frame.rename_axis("atom")


def token_examples(tokens: Frame, num: int = 2) -> Frame:
    """Return, for each atom, the sampled tokens that gave it most, where they stood: columns atom, weight, task, text.

    The token stands in brackets behind what preceded it, which is all that routing saw.
    """
    latest = tokens[tokens["stage"] == tokens.groupby("task", observed=True)["stage"].transform("max")]
    if latest.empty:
        return pd.DataFrame(columns=["atom", "weight", "task", "text"])
    num_blocks, keys = latest["block"].nunique(), ["name", "task", "row", "place", "before", "token"]
    weight = latest.groupby(keys, observed=True)["value"].sum().div(num_blocks).rename("weight").reset_index()
    weight["text"] = [visible(b) + f"[{visible(t)}]" for b, t in zip(weight["before"], weight["token"], strict=True)]
    weight = weight.sort_values(["name", "weight"], ascending=[True, False]).drop_duplicates(["name", "text"])
    best = weight.groupby("name", observed=True).head(num).reset_index(drop=True)
    return best.assign(atom=best["name"].astype(str), task=best["task"].astype(str))[["atom", "weight", "task", "text"]]


def visible(text: str) -> str:
    """Return a token with its blanks made visible."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")


# -- atoms taken out --------------------------------------------------------------------------------------------------


def removal(ablation: Frame, routing: Frame | None = None, num: int | None = None) -> Frame:
    """Return what taking an atom out costs each task, the ``num`` dearest first; all of them by default.

    Columns task, atom, whole and without (headline scores), cost (their difference: above 0 it hurts), low and high
    (its 95 % interval, by a bootstrap over test rows that both share), changed (share of answers that are others), and,
    where ``routing`` is given, usage (the atom's, by the task).
    """
    columns = ["task", "atom", "whole", "without", "cost", "low", "high", "changed"]
    scores = ablation[(ablation["row"] == -1) & ablation["metric"].isin(_HEADLINES)]
    answers, changed = ablation[ablation["row"] >= 0], ablation[ablation["metric"] == "changed"]
    share = changed.set_index(["task", "atom"])["value"]
    parts = []
    for task, own in scores.groupby("task", observed=True):
        score, taken = own.set_index("atom")["value"], own.loc[own["atom"] >= 0]
        earned = answers[answers["task"] == task].pivot_table(index="atom", columns="row", values="value")
        lost = earned.loc[-1].to_numpy() - earned.loc[taken["atom"]].to_numpy()
        if own["metric"].iloc[0] == "r2":  # squared errors: R2 loses what they gain, in units of the rows' variance
            lost = -lost * (1 - score[-1]) / earned.loc[-1].mean()
        low, high = _interval(lost)
        part = taken[["task", "name", "atom"]].assign(whole=score[-1], without=taken["value"], low=low, high=high)
        parts.append(part.assign(changed=[share.get((task, atom), np.nan) for atom in taken["atom"]]))
    if not parts:
        return pd.DataFrame(columns=columns)
    frame: Frame = pd.concat(parts, ignore_index=True)
    frame["cost"] = frame["whole"] - frame["without"]
    frame = frame.sort_values(["cost", "changed"], ascending=False, kind="stable", ignore_index=True)
    frame = frame.drop(columns="atom").rename(columns={"name": "atom"})[columns][:num]
    if routing is None:
        return frame
    used = usage(routing).stack().rename("usage")
    keys = zip(frame["task"].astype(str), frame["atom"].astype(str), strict=True)
    return frame.assign(usage=[used.get(key, 0.0) for key in keys])


def _interval(values: Array) -> tuple[Array, Array]:
    """Return the 95 % interval of the means of ``values``, (A, R), over redrawn rows; the seed is fixed."""
    num_rows = values.shape[1]
    draws = np.random.default_rng(0).multinomial(num_rows, np.full(num_rows, 1 / num_rows), NUM_DRAWS)
    low, high = np.percentile(values @ draws.T / num_rows, [2.5, 97.5], axis=1)
    return low, high
