"""The cells of a sweep: each an ordinary run in a process of its own, spread over workers by joblib (loky or Ray).

A worker only starts ``python -m continual.run`` and waits for it, so that a cell that crashes, or is killed for want of
memory, takes nothing with it. Killing the sweep ends its cells. A cell's log is locked as long as its process lives: a
sweep that goes on while a process of its former self is still at work waits for it. Imports no torch.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import joblib
from joblib.externals.loky.process_executor import BrokenProcessPool

from continual.errors import ConfigError, RunError, one_line
from continual.storage import manifest, records
from continual.storage.manifest import Manifest
from continual.storage.records import RecordError

if TYPE_CHECKING:
    import pandas as pd

Engine = Literal["loky", "ray"]


@dataclass(frozen=True)
class CellRun:
    """One run of a sweep.

    Attributes:
        sweep_dir: The sweep's directory, absolute; the same on every machine of a cluster.
        place: The run's directory within it.
        config: The run's configuration, as YAML.
        work_dir: What relative paths of the configuration start from.
        device: What CUDA_VISIBLE_DEVICES is set to; None leaves it.
        sweep_pid: The sweep's process where workers are to stop with it; None where Ray sees to that.
    """

    sweep_dir: Path
    place: str
    config: str
    work_dir: Path
    device: str | None = None
    sweep_pid: int | None = None

    @property
    def is_orphan(self) -> bool:
        """Whether the sweep is gone: it is neither this process nor, this being a worker, its parent."""
        return self.sweep_pid not in (None, os.getpid(), os.getppid())

    @property
    def run_dir(self) -> Path:
        """Where the run lies."""
        return self.sweep_dir / self.place

    @property
    def config_path(self) -> Path:
        """Where the configuration lies that the run was started with."""
        return self.sweep_dir / "configs" / f"{self.place}.yaml"

    @property
    def log_path(self) -> Path:
        """Where everything that the run printed lies."""
        return self.sweep_dir / "logs" / f"{self.place}.log"


@dataclass(frozen=True)
class CellOutcome:
    """What became of a cell.

    Attributes:
        place: The cell's.
        error: Why it is not finished, on one line; None if it is.
        seconds: Seconds of training and scoring in its finished stages; None before the first.
        scores: Headline score of each task after the last stage; empty unless finished.
    """

    place: str
    error: str | None = None
    seconds: float | None = None
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def average(self) -> float:
        """The mean of the final scores; nan where there are none."""
        return sum(self.scores.values()) / len(self.scores) if self.scores else float("nan")


def run_cells(cells: list[CellRun], engine: Engine, num_jobs: int) -> Iterator[CellOutcome]:
    """Run cells, several at a time, and yield each one's outcome when it has ended.

    Raises:
        RunError: A worker died; its cell may still be at work.
    """
    options = _ray_options(num_jobs) if engine == "ray" else {}
    with joblib.parallel_config(engine, **options):
        parallel: Any = joblib.Parallel(n_jobs=num_jobs, return_as="generator_unordered")
        try:
            yield from parallel(joblib.delayed(run_cell)(cell) for cell in cells)
        except BrokenProcessPool as error:
            raise RunError(f"a worker of the sweep died ({one_line(error, 100)}); go on with --resume") from error


def run_cell(cell: CellRun) -> CellOutcome:
    """Run a cell, or go on with it, and say what became of it; never raises."""
    try:
        if cell.is_orphan:
            raise RunError("the sweep was killed")
        cell.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(cell.log_path, "ab") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
            error = None if outcome_of(cell).error is None else _run(cell, log)
        found = outcome_of(cell)
        return found if error is None else CellOutcome(cell.place, error, found.seconds)
    except Exception as error:  # whatever it is, the other cells go on
        return CellOutcome(cell.place, one_line(error))
    finally:
        if cell.is_orphan:  # nobody waits for the outcome, and joblib would keep this worker for minutes
            os._exit(1)


def outcome_of(cell: CellRun) -> CellOutcome:
    """Return what a cell's directory holds."""
    try:
        state, _ = manifest.read(cell.run_dir)
        seconds = round(sum(state.stage_seconds.values()), 3) if state.stage_seconds else None
        if not state.complete:
            return CellOutcome(
                cell.place, f"stopped after stage {state.finished_stage} of {len(state.stages)}", seconds
            )
        scores = records.read(cell.run_dir, "scores")
    except (ConfigError, RunError, RecordError) as error:
        return CellOutcome(cell.place, one_line(error))
    final = scores_after(state, scores, state.finished_stage)
    if lacking := [task for task in state.tasks if task not in final]:
        return CellOutcome(cell.place, f"the final score of {lacking[0]} is missing", seconds)
    return CellOutcome(cell.place, None, seconds, final)


def scores_after(state: Manifest, scores: pd.DataFrame, stage: int) -> dict[str, float]:
    """Return the headline score of every task that a run scored after a stage, from its table of scores."""
    rows = scores[scores["stage"] == stage]
    values = dict(zip(zip(rows["task"], rows["metric"], strict=True), rows["value"], strict=True))
    headline = {task: (task, facts["metric"]) for task, facts in state.tasks.items()}
    return {task: float(values[key]) for task, key in headline.items() if key in values}


def _run(cell: CellRun, log: IO[bytes]) -> str | None:
    """Start or resume the run; return why it failed, or None."""
    started = (cell.run_dir / manifest.MANIFEST_NAME).exists()
    if started and cell.config_path.is_file() and cell.config_path.read_text(encoding="utf-8") != cell.config:
        return f"it was started with the other settings of {cell.config_path}: remove {cell.run_dir} to run it anew"
    cell.config_path.parent.mkdir(parents=True, exist_ok=True)
    cell.config_path.write_text(cell.config, encoding="utf-8")
    what = ["--resume", str(cell.run_dir)] if started else [str(cell.config_path), "--out", str(cell.run_dir)]
    begin = log.tell()
    code = call_run(cell, ["--no-report", *what], log)
    return None if code == 0 else _reason(cell.log_path, begin, code)


def call_run(cell: CellRun, arguments: list[str], log: IO[bytes]) -> int:
    """Run ``python -m continual.run``, which inherits the log and its lock; return its exit status, -N for signal N."""
    environment = os.environ | ({} if cell.device is None else {"CUDA_VISIBLE_DEVICES": cell.device})
    command = [sys.executable, "-m", "continual.run", *arguments]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, cwd=cell.work_dir
    )
    try:
        while not cell.is_orphan:
            try:
                return process.wait(timeout=1)
            except subprocess.TimeoutExpired:
                continue
        raise RunError("the sweep was killed")
    finally:
        if process.poll() is None:
            process.kill()  # a run may be killed at any point


def _reason(log_path: Path, begin: int, code: int) -> str:
    """Return the line of a run's log that says why it failed."""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    text = log_path.read_bytes()[begin:].decode("utf-8", "replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit status {code}"])[-1]


# -- how many at a time, and on what ----------------------------------------------------------------------------------


def start_engine(engine: Engine) -> None:
    """Connect to the Ray cluster of RAY_ADDRESS, or start one on this machine; nothing for loky.

    Raises:
        ConfigError: Ray is not installed.
    """
    if engine != "ray":
        return
    try:
        import ray
        from ray.util.joblib import register_ray
        from ray.util.joblib.ray_backend import RayBackend
    except ImportError as error:
        raise ConfigError("--engine ray needs Ray: pip install 'continual[ray]'") from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    register_ray()
    # Inherited as False from multiprocessing's pool, which Ray's is not: its results can be had as they come.
    backend: Any = RayBackend
    backend.supports_return_generator = True


def choose_jobs(engine: Engine, wanted: int | None) -> int:
    """Return how many cells run at a time.

    By default one a GPU (of the cluster, with Ray), for nobody knows how many fit; without a GPU half the cores, but
    one below four cores. Ray has two at least: joblib would run a single one in this process, and not on the cluster.

    Raises:
        ConfigError: Fewer than Ray takes, or more than its cluster has cores for.
    """
    if engine == "loky":
        cores = joblib.cpu_count()
        return wanted or len(visible_devices()) or (1 if cores < 4 else cores // 2)
    total = _cluster()
    cores = int(total.get("CPU", 0))
    chosen = wanted or max(2, int(total.get("GPU", 0)) or cores // 2)
    if not 2 <= chosen <= cores:
        raise ConfigError(f"--engine ray takes from 2 to {cores} jobs, one a core of its cluster, and not {chosen}")
    return chosen


def visible_devices() -> list[str]:
    """Return the GPUs of this machine that may be used, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _cluster() -> dict[str, Any]:
    import ray

    return ray.cluster_resources()


def _ray_options(num_jobs: int) -> dict[str, Any]:
    """Ray hides a GPU that was not asked for: ask for equal shares of all."""
    num_gpus = int(_cluster().get("GPU", 0))
    if not num_gpus:
        return {}
    jobs_a_gpu = -(-num_jobs // num_gpus)
    return {"ray_remote_args": {"num_gpus": int(1e4 / jobs_a_gpu) / 1e4}}
