"""A run directory as a real run leaves it, written through continual.records from a seeded, plausible model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.report import write_report
from continual.measures import distances
from continual.storage import records

NAMES = ["family_relationships", "aiw", "syllogism", "letter_counting"]
MakeRun = Callable[..., Path]


def keys(stage: int, task: str) -> dict[str, Any]:
    return {"run": "stages-1a2b3c", "seed": 0, "stage": stage, "task": task}


def value(metric: str, number: float, direction: str = "none", count: int = 100) -> dict[str, Any]:
    return {"metric": metric, "direction": direction, "value": float(number), "count": count}


def answer_rows(num_tasks: int, finished: int, num_rows: int, metrics: list[str], seed: int) -> list[dict[str, Any]]:
    """Rows' earnings: low before a task's stage, high just after it, fading and jumping about later."""
    rng = np.random.default_rng(seed)
    rows = []
    for task in range(num_tasks):
        difficulty, base, peak = rng.random(num_rows), rng.uniform(0.05, 0.3), rng.uniform(0.55, 0.95)
        level = base
        for stage in range(finished + 1):
            level = peak if stage == task + 1 else level + (0.03 if stage <= task else -rng.uniform(-0.02, 0.2) * level)
            for row in range(num_rows):
                earned = float(difficulty[row] < level)
                if metrics[task] == "r2":
                    earned = float((1.05 - level) * (0.2 + difficulty[row]) * (30 if stage == 0 and task == 0 else 1))
                rows.append((stage, task, row, earned))
    return [dict(zip(("stage", "task", "row", "value"), row, strict=True)) for row in rows]


def usage_model(num_tasks: int, finished: int, num_blocks: int, num_atoms: int, seed: int) -> np.ndarray:
    """Usage (S + 1, T, N, M): tasks' tastes grow as stages go by, two tasks of a kind share, two atoms stay dead."""
    rng = np.random.default_rng(seed + 1)
    taste = rng.normal(size=(num_tasks, num_blocks, num_atoms))
    taste[1::2] = 0.75 * taste[0 : 2 * (num_tasks // 2) : 2] + 0.6 * taste[1::2]
    usage = np.zeros((finished + 1, num_tasks, num_blocks, num_atoms))
    logits = 0.15 * rng.normal(size=(num_tasks, num_blocks, num_atoms))
    for stage in range(finished + 1):
        if stage:
            logits = logits + 0.25 * rng.normal(size=logits.shape) + 0.5 * taste / num_tasks
            logits[stage - 1] += 1.1 * taste[stage - 1]
        masked = logits.copy()
        masked[..., -2:] -= 9 if num_atoms > 4 else 0
        weights = np.exp(masked)
        usage[stage] = weights / weights.sum(axis=-1, keepdims=True)
    return usage


def routing_tables(directory: Path, names: list[str], usage: np.ndarray) -> None:
    """Write routing, separation and drift as the callback does: every distance a block, with its split-half null."""
    routing, separation, drift = [], [], []
    for stage, task in np.ndindex(usage.shape[:2]):
        key = keys(stage, names[task])
        for block, atom in np.ndindex(usage.shape[2:]):
            routing.append(
                key | {"block": block, "atom": atom} | value("usage", float(usage[stage, task, block, atom]))
            )
        for block, entropy in enumerate(distances.entropy_nats(usage[stage, task])):
            for metric, share in (("usage_entropy_nats", 1.0), ("token_entropy_nats", 0.6)):
                routing.append(key | {"block": block, "atom": -1} | value(metric, share * entropy))
        for other, block in np.ndindex(usage.shape[1:3]):
            p, q = usage[stage, task, block], usage[stage, other, block]
            metrics = {"js": distances.js_divergence(p, q), "kl": distances.kl_divergence(p, q)}
            if other == task:
                metrics = {"js_split_half": 0.004 + 0.001 * block, "kl_split_half": 0.009}
            for metric, distance in metrics.items():
                separation.append(key | {"other": names[other], "block": block} | value(metric, float(distance)))
        references = {"previous": stage - 1} | ({"trained": task + 1} if stage > task + 1 else {})
        for reference, reference_stage in references.items() if stage else ():
            for block in range(usage.shape[2]):
                p, q = usage[stage, task, block], usage[reference_stage, task, block]
                place = {"reference": reference, "reference_stage": reference_stage, "block": block}
                for metric, distance in (
                    ("js", distances.js_divergence),
                    ("kl", distances.kl_divergence),
                    ("tv", distances.total_variation),
                ):
                    drift.append(key | place | value(metric, float(distance(p, q))))
    for table, rows in (("routing", routing), ("separation", separation), ("drift", drift)):
        records.append(directory, table, rows)


def gradient_rows(names: list[str], finished: int, num_steps: int, seed: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(seed + 2)
    layers = [
        f"model.layers.{depth}.self_attn.{kind}"
        for depth in range(12)
        for kind in ("q_proj", "k_proj", "v_proj", "o_proj")
    ]
    for stage in range(1, finished + 1):
        for step in range(num_steps):
            place = keys(stage, names[stage - 1]) | {
                "step": (stage - 1) * num_steps + step,
                "epoch": 2 * step // num_steps,
            }
            decay = np.exp(-step / (0.4 * num_steps))
            norms = {
                layer: float(0.2 * decay * np.exp(0.1 * (index // 4) + 0.2 * rng.normal()))
                for index, layer in enumerate(layers)
            }
            for layer, norm in {**norms, "bank": 0.6 * decay}.items():
                yield place | {"layer": layer} | value("grad_norm", norm)
            concentration = max(norms.values()) / float(np.mean(list(norms.values())))
            yield place | {"layer": ""} | value("grad_concentration", concentration, "lower")
            yield place | {"layer": ""} | value("train_loss", 0.3 + 1.7 * decay + 0.1 * rng.random(), "lower")


def description(metric: str, constant: float, instruction: str, num_rows: int) -> dict[str, Any]:
    kind = {"accuracy": "labels", "score": "free", "r2": "regression"}[metric]
    rows = {"train_rows": 512, "test_rows": num_rows, "cut_rows": {"train": 3, "test": 0}, "constant_score": constant}
    return {"kind": kind, "metric": metric, "higher_is_better": True, "instruction": instruction, "labels": None} | rows


def write_run(
    directory: Path,
    names: list[str] | None = None,
    finished: int | None = None,
    metrics: list[str] | None = None,
    num_atoms: int = 16,
    num_blocks: int = 6,
    num_rows: int = 100,
    num_steps: int = 40,
    routes: bool = True,
    instructions: list[str] | None = None,
    seed: int = 3,
) -> Path:
    """Write a run of the given size; ``finished`` below the number of stages leaves it unfinished."""
    names = NAMES if names is None else names
    finished = len(names) if finished is None else finished
    metrics = metrics or ["score"] * len(names)
    answers = answer_rows(len(names), finished, num_rows, metrics, seed)
    records.append(
        directory,
        "answers",
        [
            keys(a["stage"], names[a["task"]]) | {"row": a["row"], "value": a["value"], "prediction": "…"}
            for a in answers
        ],
    )
    earned = np.zeros((finished + 1, len(names), num_rows))
    for a in answers:
        earned[a["stage"], a["task"], a["row"]] = a["value"]
    scores = []
    for stage, task in np.ndindex(earned.shape[:2]):
        key, mean = keys(stage, names[task]), earned[stage, task].mean()
        if metrics[task] == "r2":
            scores += [
                key | value("r2", 1 - mean / 0.7, "higher", num_rows),
                key | value("rmse", mean**0.5, "lower", num_rows),
            ]
        else:
            scores.append(key | value(metrics[task], mean, "higher", num_rows))
    records.append(directory, "scores", scores)
    if routes and finished >= 0:
        routing_tables(directory, names, usage_model(len(names), finished, num_blocks, num_atoms, seed))
    records.append(directory, "gradients", gradient_rows(names, finished, num_steps, seed))
    model = {
        "backbone": "SmolLM2-135M-Instruct",
        "adapter": "continual.adapters.QueryableLoraConfig" if routes else "peft.LoraConfig",
    }
    model |= {"trainable_parameters": 468_992, "total_parameters": 134_984_064, "prior_weight": 1.0 if routes else None}
    model |= {
        "num_atoms": num_atoms if routes else None,
        "num_blocks": num_blocks if routes else None,
        "top_k": 4 if routes else None,
    }
    instructions = instructions or [f"Answer the question of kind {name}." for name in names]
    constants = [0.0 if metric == "r2" else 0.1 + 0.05 * (index % 4) for index, metric in enumerate(metrics)]
    described = zip(names, metrics, constants, instructions, strict=True)
    manifest = {
        "format": 1,
        "run": "stages-1a2b3c",
        "seed": 0,
        "stages": names,
        "finished_stage": finished,
        "complete": finished == len(names),
        "model": model,
        "tasks": {name: description(metric, constant, text, num_rows) for name, metric, constant, text in described},
        "environment": {"torch": "2.13.0", "python": "3.11.7", "device": "cpu", "threads": 2},
        "stage_seconds": {str(stage): 12.3 + 60.1 * (stage > 0) for stage in range(finished + 1)},
        "scoring_seconds": {str(stage): 12.1 for stage in range(finished + 1)},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return directory


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Write a run into a fresh directory; keyword arguments as ``write_run``."""

    def make(name: str = "run", **kwargs: Any) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        return write_run(directory, **kwargs)

    return make


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three stages that tests only read."""
    return write_run(
        tmp_path_factory.mktemp("small"), names=NAMES[:3], num_atoms=6, num_blocks=2, num_rows=40, num_steps=12
    )


@pytest.fixture(scope="session")
def small_report(small_run: Path) -> Path:
    """The report of ``small_run``, its figures saved, that tests only read."""
    return write_report(small_run)
