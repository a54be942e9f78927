"""What grows: start-up, the report of a large sweep, the share of scoring, a step by atoms, rank, blocks and slices."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from bench_training import Case, grow, step_of
from measuring import Result, Setting, Stand, spread
from subjects import TEXT_LENGTHS, RandomText, ShapedLM, backbone_dtype, queryable, sequence

from analysis.report import write_report
from continual.training.module import ContinualModule

ROOT = Path(__file__).resolve().parents[2]

_READY = """
import json, sys, time
began = float(sys.argv[1])
clock = time.process_time if sys.argv[4] == "cpu" else lambda: time.time() - began
marks = {}
from pathlib import Path
from continual.runtime.quiet import quieten
from continual.commands.run import import_engine
quieten()
import_engine()
from continual.config import experiment
from continual.engine.stage_loop import StageLoop
marks["imports"] = clock()
overrides = ["trainer.max_steps=1", f"trainer.accelerator={sys.argv[4]}"]
run = StageLoop(experiment.load(sys.argv[2], overrides), Path(sys.argv[3]))
marks["configuration"] = clock()
run.prepare()
marks["backbone and rows"] = clock()
step = run.module.training_step
def first(batch, batch_idx):
    marks["first step"] = clock()
    return step(batch, batch_idx)
run.module.training_step = first
run.begin(1, run.data)
run._fit(1)
marks["first step done"] = clock()
print(json.dumps(marks))
"""
"""A process of its own: a configuration as far as its first training step, without the untrained model's scores."""


def run(setting: Setting) -> Iterator[Result]:
    """Measure all of it."""
    if setting.wants("import"):
        yield from imports(setting)
    if setting.wants("start-up"):
        yield from start_up(setting)
    if setting.wants("report"):
        yield from report(setting)
    if setting.wants("memory"):
        yield from memory(setting)
    if setting.wants("scoring share"):
        yield from scoring_share(setting)
    yield from curves(setting)


def imports(setting: Setting) -> Iterator[Result]:
    """Time ``import continual`` in processes of their own."""
    code = "import time; t = time.perf_counter(); import continual; print(time.perf_counter() - t)"
    seconds = [float(_python("-c", code)) for _ in range(setting.num_rounds(7))]
    yield Result("growth", "import", "import continual", **spread(seconds), unit="s", goal="<= 0.3")


def start_up(setting: Setting) -> Iterator[Result]:
    """Time a process from its start to the first training step, the backbone's files unpacked before.

    By the same clocks as ``Stand``: on a CPU, processor time.
    """
    config = ROOT / "configs" / ("smoke.yaml" if setting.tiny else "stages.yaml")
    rounds = []
    for _ in range(setting.num_rounds(3) + (not setting.tiny)):  # the first one unpacks the backbone and fills caches
        with tempfile.TemporaryDirectory() as folder:
            device = "gpu" if setting.cuda else "cpu"
            out = _python("-c", _READY, str(time.time()), str(config), f"{folder}/run", device)
            rounds.append(json.loads(out.splitlines()[-1]))
    rounds = rounds[not setting.tiny :]
    detail = {
        "config": config.name,
        "seconds_from_start": {name: spread([r[name] for r in rounds])["value"] for name in rounds[0]},
    }
    for name, goal in (("first step", "<= 6"), ("first step done", None)):
        seconds = spread([marks[name] for marks in rounds])
        yield Result(
            "growth", f"start-up {config.stem}", f"start to {name}", **seconds, unit="s", goal=goal, detail=detail
        )


def _python(*arguments: str) -> str:
    """Return what another Python wrote on standard output."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, *arguments], env=os.environ | {"PYTHONPATH": paths}, cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


def report(setting: Setting) -> Iterator[Result]:
    """Time the report of a sweep of 50 runs of ten tasks."""
    write = runpy.run_path(str(ROOT / "tests" / "analysis" / "sweep_files.py"))["plausible_sweep"]
    tasks, rows, orders = (3, 10, 1) if setting.tiny else (10, 500, 10)
    methods = ("growing", "replay", "ewc", "sequential", "joint")
    with tempfile.TemporaryDirectory() as folder:
        sweep = write(
            Path(folder) / "sweep", methods, tasks, [f"order{index}" for index in range(orders)], num_rows=rows
        )
        clock = time.perf_counter if setting.cuda else time.process_time
        began = clock()
        write_report(sweep)
        seconds = clock() - began
    detail = {"runs": orders * len(methods), "tasks": tasks, "test_rows": rows}
    case = f"report of {orders * len(methods)} runs"
    yield Result("growth", case, "analysis.report", seconds, "s", goal="<= 60", detail=detail)


def memory(setting: Setting) -> Iterator[Result]:
    """Compare what a run of the growing bank keeps in memory from stage to stage with the bank itself.

    From the second stage, the first ones fill allocators and caches, to the last but one: after the last, all tasks'
    tokens are sampled at once.
    """
    shape, count, rows = setting.pick("qwen2.5-0.5b", "smollm2-135m", "tiny"), setting.pick(10, 10, 5), 8
    script = str(ROOT / "tests" / "benchmarks" / "stages_memory.py")
    out = _python(script, setting.device.type, shape, str(count), str(rows), str(setting.seed))
    stages: list[dict[str, int]] = json.loads(out.splitlines()[-1])
    first, last = stages[2], stages[-2]
    grown = {name: last[name] - first[name] for name in first}
    detail = {"shape": shape, "stages": count, "rows_a_task": rows, "bytes_after_stages": stages, "grown_bytes": grown}
    case = f"{shape} memory of {count} stages"
    for name, of, goal in (
        ("resident", "process", "<= 1"),
        ("tensors", "all tensors", None),
        ("gpu", "GPU", "<= 1"),
    ):
        if name in grown:
            measure = f"growth of the {of} / of the bank"
            yield Result("growth", case, measure, grown[name] / grown["bank"], goal=goal, detail=detail)


def scoring_share(setting: Setting) -> Iterator[Result]:
    """Compute the share of a run's time that scoring takes, from the time a row of each kind takes.

    Ten stages, 1,000 training rows and 500 test rows each, for one epoch and for three; the text suite's lengths and
    the same four labels for all tasks. All tasks are scored at once, as after a stage in the middle.
    """
    shape, count = setting.pick("qwen2.5-0.5b", "smollm2-short", "tiny"), setting.pick(500, 60, 4)
    tasks, test_rows, trained = 10, 500, 10 * 1000
    lengths = [TEXT_LENGTHS[index % len(TEXT_LENGTHS)] for index in range(count)]
    suite = [RandomText(lengths, ["yes", "no", "so", "may"], seed=setting.seed + task) for task in range(tasks)]
    module = ContinualModule(ShapedLM(shape, setting.seed, backbone_dtype(setting)), queryable(), compile=setting.cuda)
    with tempfile.TemporaryDirectory() as folder:
        stages = sequence(setting, Path(folder) / "run", module, suite, {"batch_size": setting.pick(32, 8, 2)})
        stages.begin(1, stages.data)
        trainers = [stages._fit(1)]
        stand = Stand(setting.device)
        stand.add("train", lambda: lambda: trainers.append(stages._fit(1)), warm_up=0)
        stand.add("score", lambda: lambda: stages._score(tasks // 2, trainers[-1], stages.data), warm_up=1)
        timings = stand.run(setting.num_rounds(3))
    train, score = timings.median("train") / count, timings.median("score") / (tasks * count)
    scored = {"all": 11 * tasks, "seen": tasks + sum(range(1, tasks + 1)), "final": 2 * tasks + tasks - 1}
    for epochs, (scoring, times) in itertools.product((1, 3), scored.items()):
        share = times * test_rows * score / (times * test_rows * score + epochs * trained * train)
        detail = {"train_seconds_a_row": train, "score_seconds_a_row": score, "scored_rows": times * test_rows}
        detail |= {"trained_rows": trained, "shape": shape, "epochs": epochs} | timings.detail()
        case = f"{shape} scoring share, scoring={scoring}, epochs={epochs}"
        yield Result("growth", case, "scoring / (scoring + training)", share, goal="<= 0.25", detail=detail)


def curves(setting: Setting) -> Iterator[Result]:
    """Time a training step by the number of atoms, the rank, the number of blocks and of slices, one at a time.

    On a GPU steps are recorded: what differs would else be lost in the time that launches take.
    """
    axes = {"num_atoms": (4, 16, 64, 256), "r": (4, 8, 16, 32), "num_blocks": (1, 2, 3, 6), "slices": (1, 4, 10)}
    size = setting.pick((("qwen2.5-0.5b", 8, 512)), ("smollm2-short", 4, 64), ("tiny", 2, 16))
    for axis, values in axes.items():
        case = f"{size[0]} curve {'rank' if axis == 'r' else axis}"
        if not setting.wants(case):
            continue
        stand, names = Stand(setting.device), []
        for value in [values[0], values[-1]] if setting.tiny else values:
            names.append(f"{axis}={value}")
            stand.add(names[-1], partial(_point, setting, size, axis, value), warm_up=setting.pick(3, 2, 1))
        timings = stand.run(setting.num_rounds(7), repeats=setting.pick(5, 1, 1))
        for name in names:
            detail = {"shape": size[0], "rows": size[1], "tokens": size[2], "against": names[0]} | timings.detail()
            ratio = timings.ratio(name, names[0])
            yield Result("growth", case, f"step at {name} / at {names[0]}", **ratio, detail=detail)


def _point(setting: Setting, size: tuple[str, int, int], axis: str, value: int) -> Any:
    config = queryable(**({} if axis == "slices" else {axis: value}))
    prepare = partial(grow, num_slices=value) if axis == "slices" else None
    return step_of(Case(*size), config, setting, setting.pick("graphs", "eager", "eager"), prepare)
