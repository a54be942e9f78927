"""A sweep directory as continual.sweep leaves it, its cells written through continual.records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from continual.storage import records

Earned = np.ndarray  # (T + 1, T, rows): what each row of each task earned after each stage


def write_cell(
    directory: Path,
    stages: Sequence[str],
    earned: Earned,
    seed: int = 0,
    constants: Mapping[str, float] | None = None,
    rows: Sequence[int] | None = None,
    **manifest: Any,
) -> None:
    """Write a run whose rows earned ``earned``; a matrix of one stage is the untrained backbone's."""
    directory.mkdir(parents=True)
    scores, answers = [], []
    ids = list(range(earned.shape[2])) if rows is None else list(rows)
    for stage, task in np.ndindex(earned.shape[:2]):
        key = {"run": directory.name, "seed": seed, "stage": stage, "task": stages[task]}
        mean = float(earned[stage, task].mean())
        scores.append(key | {"metric": "accuracy", "direction": "higher", "value": mean, "count": len(ids)})
        for row, value in zip(ids, earned[stage, task], strict=True):
            answers.append(key | {"row": row, "value": float(value), "prediction": "…"})
    records.append(directory, "scores", scores)
    records.append(directory, "answers", answers)
    constants = constants or {}
    tasks = {
        name: {"metric": "accuracy", "kind": "labels", "constant_score": constants.get(name, 0.25)} for name in stages
    }
    facts = {"run": directory.name, "seed": seed, "stages": list(stages), "finished_stage": len(earned) - 1}
    facts |= {"complete": True, "tasks": tasks, "model": {"backbone": "SmolLM2-135M-Instruct", "adapter": "peft.Lora"}}
    (directory / "manifest.json").write_text(json.dumps(facts | manifest))


def write_sweep(directory: Path, cells: Sequence[Mapping[str, Any]], **facts: Any) -> Path:
    """Write sweep.json over cells that were written, or are said to have failed or to wait."""
    directory.mkdir(parents=True, exist_ok=True)
    orders = {cell["order"]: [] for cell in cells}
    methods = {cell["method"]: {"model.strategy": cell["method"]} for cell in cells}
    filled = [{"status": "done", "error": None, "seconds": 12.5, **cell} for cell in cells]
    content = {"format": 1, "name": "trial", "base": "configs/smoke.yaml", "baseline": None}
    content |= {"methods": methods, "orders": orders, "cells": filled}
    (directory / "sweep.json").write_text(json.dumps(content | facts))
    return directory


def place(method: str, order: str, seed: int) -> dict[str, Any]:
    """Return a cell's entry in sweep.json."""
    return {"method": method, "order": order, "seed": seed, "dir": f"cells/{method}/{order}-seed{seed}"}


# What a plausible method keeps of a task at each later stage, and how well it learns one.
KEEPS = {"growing": 0.995, "joint": 1.0, "replay": 0.97, "ewc": 0.93, "sequential": 0.86, "per_task": 1.0}
LEARNS = {"growing": 0.86, "joint": 0.84, "replay": 0.83, "ewc": 0.80, "sequential": 0.85, "per_task": 0.86}


def plausible(method: str, stages: Sequence[str], names: Sequence[str], num_rows: int, seed: int) -> Earned:
    """Return rows' earnings under a method: rows have a difficulty of their own, alike for all methods and seeds."""
    rng = np.random.default_rng([seed, len(method), sum(map(ord, method))])
    earned = np.zeros((len(stages) + 1, len(stages), num_rows))
    for task, name in enumerate(stages):
        index = names.index(name)
        difficulty = np.random.default_rng(index).random(num_rows)
        peak = LEARNS.get(method, 0.8) - 0.06 * index % 0.3 if index < len(names) - 1 else 0.27
        for stage in range(len(stages) + 1):
            level = 0.25 if stage <= task else peak * KEEPS.get(method, 0.9) ** (stage - task - 1)
            earned[stage, task] = difficulty + 0.06 * rng.normal(size=num_rows) < level + 0.02 * rng.normal()
    return earned


def plausible_sweep(
    directory: Path,
    methods: Sequence[str] = ("growing", "replay", "ewc", "sequential", "joint", "per_task"),
    num_tasks: int = 5,
    orders: Sequence[str] = ("first", "second", "third"),
    seeds: Mapping[str, int] | None = None,
    num_rows: int = 120,
    **facts: Any,
) -> Path:
    """Write a sweep of plausible runs; ``seeds`` says how many each order has (one unless said)."""
    names = [f"task_{index}" for index in range(num_tasks - 1)] + ["coin_toss"]
    cells = []
    for number, order in enumerate(orders):
        stages = list(np.random.default_rng(number).permutation(names))
        for seed in range((seeds or {}).get(order, 1)):
            for method in methods:
                cells.append(place(method, order, seed))
                model = {"backbone": "SmolLM2-135M-Instruct", "adapter": "peft.LoraConfig"}
                model |= {"trainable_parameters": 921_600, "stored_parameters": 921_600 + 1000 * len(method)}
                write_cell(
                    directory / cells[-1]["dir"],
                    stages,
                    plausible(method, stages, names, num_rows, 10 * number + seed),
                    seed,
                    model=model,
                    stored_bytes={str(stage): 4000 * stage for stage in range(len(stages) + 1)},
                )
    return write_sweep(directory, cells, **{"baseline": "sequential", "base": "mixed.yaml"} | facts)
