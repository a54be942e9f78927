"""Every strategy end to end: it trains a sequence, and what a kill leaves of it goes on to the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import run_and_go_on

from continual.engine.stage_loop import StageLoop
from continual.storage.files import size_bytes
from continual.training.module import ContinualModule

STRATEGIES: dict[str, dict[str, Any]] = {
    "Sequential": {},
    "ExperienceReplay": {"size": 4},
    "DERPlusPlus": {"size": 4, "memory_batch_size": 2},
    "AGEM": {"size": 4, "memory_batch_size": 2},
    "EWC": {"weight": 10.0, "fisher_rows": 3},
    "OnlineEWC": {"weight": 10.0, "fisher_rows": 3},
    "LwF": {},
    "OLoRA": {},
    "SEQR": {"calibration_rows": 3},
    "NLoRA": {},
    "CLoRA": {},
    "PerTask": {},
    "PerInstructionLookup": {},
    "Joint": {},
    "GrowingBank": {"instruction_encoder": "backbone", "depth": 0.5, "probe_rows": 4},
}
ROUTED_ONLY = {"GrowingBank": ("queryable", "queryable_regressor")}
CASES = [
    (name, adapter) for name in STRATEGIES for adapter in ROUTED_ONLY.get(name, ("lora", "queryable", "regressor"))
]
LORA_ONLY = [(name, "queryable") for name in ("OLoRA", "NLoRA", "CLoRA", "SEQR")]


@pytest.mark.parametrize(
    ("strategy", "adapter", "moment"),
    [(*case, "score") for case in CASES if case not in LORA_ONLY]
    + [(name, "lora", moment) for name in ("DERPlusPlus", "OLoRA") for moment in ("train", "commit")],
)
def test_killed_run_goes_on_to_the_same_scores(
    strategy: str,
    adapter: str,
    moment: str,
    configure: Callable[..., str],
    tmp_path: Path,
) -> None:
    text = configure(strategy, adapter, num_stages=3, rows=4, **STRATEGIES[strategy])
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = run_and_go_on(text, whole, cut, moment)

    for table in ("scores", "answers", "gradients", *(["routing"] if "queryable" in adapter else [])):
        assert (whole / f"{table}.parquet").read_bytes() == (cut / f"{table}.parquet").read_bytes(), table
    files = sorted(path.relative_to(whole) for path in (whole / "adapters" / "stage-03").iterdir())
    assert [path.name for path in files if path.suffix == ".safetensors"]
    for file in files:
        assert (whole / file).read_bytes() == (cut / file).read_bytes(), file
    last = "adapters/stage-03/adapter_model.safetensors"
    facts = json.loads((cut / "manifest.json").read_text())
    assert facts["model"]["strategy"] == strategy
    kept = size_bytes(whole / "strategy")
    if strategy in ("OLoRA", "NLoRA"):
        kept += run.module.strategy._pair_bytes  # type: ignore[attr-defined]
        assert 0 < (whole / last).stat().st_size - run.module.strategy._pair_bytes < 4096  # type: ignore[attr-defined]
    assert facts["stored_bytes"]["3"] == kept
    assert [path.name for path in (whole / "strategy").glob("*")] in ([], ["stage-03"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("strategy", "adapter"), [case for case in CASES if case not in LORA_ONLY])
def test_every_strategy_runs_on_a_gpu(strategy: str, adapter: str, sequence: Callable[..., StageLoop]) -> None:
    made = sequence(strategy, adapter, num_stages=3, rows=4, **STRATEGIES[strategy])
    made.experiment.trainer["accelerator"] = "gpu"
    made.run()
    assert made.manifest.complete and made.module.device.type == "cuda"


def test_no_stage_moves_the_model_to_the_host(
    sequence: Callable[..., StageLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[ContinualModule] = []
    monkeypatch.setattr(ContinualModule, "cpu", moved.append, raising=False)
    made = sequence("Sequential", rows=4)
    made.run()
    assert not moved and "cpu" not in vars(made.module)
