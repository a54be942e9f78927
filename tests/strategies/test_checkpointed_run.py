"""A growing bank trained under activation checkpointing is, byte for byte, the one that was trained without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from continual.config import experiment
from continual.engine.stage_loop import StageLoop


def test_checkpointing_changes_nothing_of_a_run(configure: Callable[..., str], tmp_path: Path) -> None:
    tree = yaml.safe_load(
        configure("GrowingBank", "queryable", instruction_encoder="backbone", depth=0.5, probe_rows=4)
    )
    for name in ("plain", "checkpointed"):
        tree["model"]["gradient_checkpointing"] = name == "checkpointed"
        run = StageLoop(experiment.parse(yaml.safe_dump(tree), "run"), tmp_path / name)
        run.prepare()
        run.run()
    last = [tmp_path / name / "adapters" / "stage-02" for name in ("plain", "checkpointed")]
    files = [path.relative_to(last[0]) for path in last[0].rglob("*.safetensors")]
    assert files
    for file in files:
        assert (last[0] / file).read_bytes() == (last[1] / file).read_bytes(), file
