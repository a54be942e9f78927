"""A run over a backbone in 4 bits: killed after two stages, it goes on to the same bytes as the run that was not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from killing import run_and_go_on

from continual.adapters import GateInputs, load_bank

pytest.importorskip("bitsandbytes")

NF4 = {
    "class_path": "transformers.BitsAndBytesConfig",
    "init_args": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "float32"},
}
BANK: dict[str, Any] = {"instruction_encoder": "backbone", "depth": 0.5, "probe_rows": 4}


@pytest.mark.parametrize(
    ("strategy", "adapter", "chosen"),
    [("SEQR", "lora", {"calibration_rows": 3}), ("OLoRA", "lora", {}), ("GrowingBank", "queryable", BANK)],
)
def test_a_killed_run_goes_on_to_the_same_bytes(
    strategy: str,
    adapter: str,
    chosen: dict[str, Any],
    configure: Callable[..., str],
    tmp_path: Path,
) -> None:
    tree = yaml.safe_load(configure(strategy, adapter, num_stages=3, rows=4, **chosen))
    tree["model"]["backbone"]["init_args"] = {"hidden_size": 64, "num_layers": 2, "quantization": NF4}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = run_and_go_on(yaml.safe_dump(tree), whole, cut)

    for table in ("scores", "answers", "gradients"):
        assert (whole / f"{table}.parquet").read_bytes() == (cut / f"{table}.parquet").read_bytes(), table
    weights = list((whole / "adapters" / "stage-03").rglob("*.safetensors"))
    assert weights
    for file in weights:
        assert file.read_bytes() == (cut / file.relative_to(whole)).read_bytes(), file
    assert json.loads((cut / "manifest.json").read_text())["model"]["backbone"] == "tiny-random, nf4"
    if strategy == "GrowingBank":
        backbone: Any = run.module.backbone
        model = load_bank(backbone.build(), whole / "adapters" / "stage-03")
        prompts = backbone.tokenizer(["red sign 1"], return_tensors="pt")
        given = GateInputs(model, backbone.tokenizer)(["red sign 1"], ["Sort by sign."])
        with torch.inference_mode():
            assert model(**prompts, **given).logits.isfinite().all()
