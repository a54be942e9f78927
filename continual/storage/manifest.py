"""What of a run is finished, in one JSON file that is replaced whole: the only thing that resuming trusts."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from continual.errors import ConfigError, RunError
from continual.storage.files import atomic_directory, write_json

CONFIG_NAME = "experiment.yaml"
MANIFEST_NAME = "manifest.json"
_PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "torchmetrics")


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
        scoring_seconds: Those of scoring the tasks, of each stage that was scored.
        stored_bytes: Bytes on disk that the strategy keeps for later stages, after each finished stage.
        stored_parameters: Numbers that are kept to answer all tasks so far, the backbone's apart, after each stage.
        serving_parameters: How many of them a forward pass reads for one row, at most.
        milliseconds_a_row: What answering one test row took after each stage, the median over scoring batches.
        bounds: Names of the bounds that are set beside the run.
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
    scoring_seconds: dict[str, float] = field(default_factory=dict)
    stored_bytes: dict[str, int] = field(default_factory=dict)
    stored_parameters: dict[str, int] = field(default_factory=dict)
    serving_parameters: dict[str, int] = field(default_factory=dict)
    milliseconds_a_row: dict[str, float] = field(default_factory=dict)
    bounds: list[str] = field(default_factory=list)
    format: int = 1

    def commit(self, run_dir: Path) -> None:
        """Replace the manifest in ``run_dir``, atomically and durably."""
        write_json(run_dir / MANIFEST_NAME, asdict(self))


def create(run_dir: Path, config_text: str, manifest: Manifest) -> None:
    """Make a new run directory with its configuration and first manifest, whole or not at all."""
    with atomic_directory(run_dir) as temporary:
        (temporary / CONFIG_NAME).write_text(config_text, encoding="utf-8")
        manifest.commit(temporary)


def check_new(run_dir: Path) -> None:
    """Raise ConfigError if ``run_dir`` cannot become a new run's directory."""
    if (run_dir / MANIFEST_NAME).exists():
        raise ConfigError(f"{run_dir} holds a run already: go on with it (--resume {run_dir}) or name another --out")
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
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
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    text = config_path.read_text(encoding="utf-8")
    if sha256(text) != manifest.config_sha256:
        raise ConfigError(
            f"{config_path} was edited since the run started: undo the edit to resume, or start a new run with it"
        )
    return manifest, text


def sha256(text: str) -> str:
    """Return the hash that tells one configuration from another."""
    return hashlib.sha256(text.encode()).hexdigest()


def environment(device: str, num_devices: int) -> dict[str, Any]:
    """Return what the numbers of a run may depend on besides its configuration."""
    import torch  # here, so that a manifest is read without it

    facts: dict[str, Any] = {name: metadata.version(name) for name in _PACKAGES}
    facts |= {"python": platform.python_version(), "device": device, "num_devices": num_devices}
    return facts | {"threads": torch.get_num_threads()}
