"""What of a run is finished, in one JSON file that is replaced whole: the only thing that resuming trusts."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from continual.errors import ConfigError, RunError
from continual.storage.files import write_json, write_text
from continual.storage.lock import LOCK_NAME, DirectoryLock

CONFIG_NAME = "experiment.yaml"
MANIFEST_NAME = "manifest.json"
FORMAT = 2
"""Version of a run directory's layout; 1 had no digests."""
_PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "torchmetrics")


_KINDS: dict[str, type] = {"str": str, "int": int, "bool": bool, "list": list, "dict": dict}


@dataclass
class Manifest:
    """A run's state on disk.

    Attributes:
        run: The run's name: the configuration's stem and a hash of the resolved configuration.
        seed: The run's seed.
        config_sha256: Hash of the saved configuration, so that an edit is noticed on resuming.
        stages: Stage names, in training order; each names its task too.
        finished_stage: Last stage whose rows and adapter are on disk: -1 none, 0 the untrained scores.
        complete: Whether every stage is finished.
        tasks: Facts of every task, by name.
        model: Facts of backbone and adapter.
        environment: Versions, device and threads that produced the numbers.
        stage_seconds: Wall-clock seconds of each finished stage, training and scoring.
        trained_steps: Optimizer steps that each stage was trained for, whatever the trainer's limits left of its plan.
        scoring_seconds: Those of scoring the tasks, of each stage that was scored.
        stored_bytes: Bytes on disk that the strategy keeps for later stages, after each finished stage.
        stored_parameters: Numbers that are kept to answer all tasks so far, the backbone's apart, after each stage.
        serving_parameters: How many of them a forward pass reads for one row, at most.
        milliseconds_a_row: What answering one test row took after each stage, the median over scoring batches.
        bounds: Names of the bounds that are set beside the run.
        data: A digest of the rows of each task's splits, by task and split.
        accepted_data: A line for each split that was replaced while the run was not finished, or after it.
        tables: A digest of each table's rows, by table and stage.
        files: Size and SHA-256 of what resuming reads beside the tables, by path within the run's directory.
        format: Version of this layout.
    """

    run: str
    seed: int
    config_sha256: str
    stages: list[str]
    finished_stage: int = -1
    complete: bool = False
    tasks: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    trained_steps: dict[str, int] = field(default_factory=dict)
    scoring_seconds: dict[str, float] = field(default_factory=dict)
    stored_bytes: dict[str, int] = field(default_factory=dict)
    stored_parameters: dict[str, int] = field(default_factory=dict)
    serving_parameters: dict[str, int] = field(default_factory=dict)
    milliseconds_a_row: dict[str, float] = field(default_factory=dict)
    bounds: list[str] = field(default_factory=list)
    data: dict[str, dict[str, str]] = field(default_factory=dict)
    accepted_data: list[str] = field(default_factory=list)
    tables: dict[str, dict[str, str]] = field(default_factory=dict)
    files: dict[str, list[Any]] = field(default_factory=dict)
    format: int = FORMAT

    def commit(self, run_dir: Path) -> None:
        """Replace the manifest in ``run_dir``, atomically and durably."""
        write_json(run_dir / MANIFEST_NAME, asdict(self))


def create(run_dir: Path, config_text: str, manifest: Manifest, lock: DirectoryLock | None = None) -> None:
    """Make a new run of a directory, with its configuration and first manifest; without the manifest it is no run.

    Raises:
        ConfigError: Another process is making a run of it, or has made one.
    """
    make(run_dir, lock)
    check_new(run_dir)
    write_text(run_dir / CONFIG_NAME, config_text)
    manifest.commit(run_dir)


def make(directory: Path, lock: DirectoryLock | None = None) -> None:
    """Make a directory, if it is not there, and take its lock.

    Raises:
        ConfigError: It cannot be made, or another process holds its lock.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory} cannot be made: {error.strerror}") from error
    if lock is not None:
        lock.acquire()


def check_new(run_dir: Path, begun: Collection[str] = (CONFIG_NAME, MANIFEST_NAME)) -> None:
    """Raise ConfigError if ``run_dir`` cannot become a new run's directory.

    Args:
        run_dir: The directory.
        begun: Files of which some may be there: what was killed as it made the directory leaves all but the last.
    """
    if (run_dir / MANIFEST_NAME).exists():
        raise ConfigError(f"{run_dir} holds a run already: go on with it (--resume {run_dir}) or name another --out")
    allowed = {LOCK_NAME, *begun, *(f".{name}.tmp" for name in begun)}
    if run_dir.exists() and (not run_dir.is_dir() or {path.name for path in run_dir.iterdir()} - allowed):
        raise ConfigError(f"{run_dir} exists and is not an empty directory: name another --out")
    ancestor = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise ConfigError(f"{run_dir} cannot be made: {ancestor} is not a directory that can be written to")


def read_finished(run_dir: Path) -> tuple[Manifest, str]:
    """Return what ``read`` does, of a run that is complete.

    Raises:
        ConfigError: As ``read``, or a stage is still to come.
        RunError: As ``read``.
    """
    state, text = read(run_dir)
    if not state.complete:
        raise ConfigError(
            f"{run_dir} is not finished (stage {state.finished_stage} of {len(state.stages)} is): resume it first"
        )
    return state, text


def read(run_dir: Path) -> tuple[Manifest, str]:
    """Return the manifest of a run and the text of its configuration.

    Raises:
        ConfigError: There is no run, or its configuration was edited since it started.
        RunError: The manifest is damaged.
    """
    path, config_path = run_dir / MANIFEST_NAME, run_dir / CONFIG_NAME
    if not path.is_file() or not config_path.is_file():
        raise ConfigError(f"{run_dir} holds no run to resume: {MANIFEST_NAME} or {CONFIG_NAME} is missing")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if wrong := _wrong(tree):
            raise RunError(f"{path} is {wrong}")
        manifest = Manifest(**{"format": 1} | tree)
        text = config_path.read_text(encoding="utf-8")
    except (ValueError, TypeError) as error:  # a UnicodeDecodeError is a ValueError
        raise RunError(f"{path if isinstance(error, json.JSONDecodeError) else run_dir} is damaged: {error}") from error
    if sha256(text) != manifest.config_sha256:
        raise ConfigError(
            f"{config_path} was edited since the run started: undo the edit to resume, or start a new run with it"
        )
    return manifest, text


def _wrong(tree: Any) -> str:
    """Return what in a manifest is not as a run writes it, and "" where nothing is: all else relies on that."""
    if not isinstance(tree, dict):
        return "damaged: a JSON object is expected"
    written = tree.get("format", 1)
    if not isinstance(written, int) or isinstance(written, bool):
        return f"damaged: format is a number, not {written!r}"
    if written > FORMAT:
        return f"of format {written}, and this version reads up to {FORMAT}: update it to go on with the run"
    for each in fields(Manifest):
        if each.name not in tree:
            if each.name in ("run", "seed", "config_sha256", "stages"):
                return f"damaged: it lacks {each.name}"
            continue
        kind = _KINDS[str(each.type).partition("[")[0]]
        value = tree[each.name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            return f"damaged: {each.name} is a {kind.__name__}, not {value!r:.60}"
    if not all(isinstance(stage, str) for stage in tree["stages"]) or len(set(tree["stages"])) < len(tree["stages"]):
        return "damaged: stages is a list of different names"
    finished, count = tree.get("finished_stage", -1), len(tree["stages"])
    if not -1 <= finished <= count:
        return f"damaged: finished_stage is a number from -1 to {count}, not {finished}"
    if tree.get("complete", False) != (finished == count):
        return f"damaged: complete is {tree.get('complete', False)} with {finished} of {count} stages finished"
    return ""


def sha256(text: str) -> str:
    """Return the hash that tells one configuration from another."""
    return hashlib.sha256(text.encode()).hexdigest()


def environment(device: str, num_devices: int) -> dict[str, Any]:
    """Return what the numbers of a run may depend on besides its configuration."""
    import torch  # here, so that a manifest is read without it

    facts: dict[str, Any] = {name: metadata.version(name) for name in _PACKAGES}
    facts |= {"python": platform.python_version(), "device": device, "num_devices": num_devices}
    return facts | {"threads": torch.get_num_threads()}
