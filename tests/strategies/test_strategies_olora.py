"""O-LoRA: pairs of earlier stages stay as they are, new ones keep away from them, and the folder is plain LoRA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from continual.backbones import TinyCausalLM
from continual.engine.stage_loop import StageLoop
from continual.strategies import OLoRA


def overlap(run: StageLoop) -> float:
    """Return how much of the second pair's A lies along the first's: mean of |cos| over all pairs of directions."""
    total = []
    for name, weight in run.module.named_parameters():
        if "lora_A" in name:
            first, second = (torch.nn.functional.normalize(part, dim=1) for part in weight.split(2))
            total.append((first @ second.T).abs().mean())
    return torch.stack(total).mean().item()


def scaling_of(model: PeftModel) -> float:
    """Return lora_alpha / r as the model's first adapted layer applies it."""
    return next(part.scaling["default"] for part in model.modules() if isinstance(part, LoraLayer))


def test_overlap_falls_with_the_weight(sequence: Callable[..., StageLoop]) -> None:
    overlaps = []
    for weight in (0.0, 1.0, 100.0):
        run = sequence("OLoRA", run=f"run{weight}", weight=weight)
        run.run()
        overlaps.append(overlap(run))
    assert overlaps[0] > overlaps[1] > overlaps[2]
    assert overlaps[2] < 0.3 * overlaps[0]


def test_earlier_pairs_are_kept_and_the_folder_loads_by_itself(
    sequence: Callable[..., StageLoop], tmp_path: Path
) -> None:
    run = sequence("OLoRA", num_stages=3)
    run.run()
    folders = [tmp_path / "run" / "adapters" / f"stage-{stage:02d}" for stage in (1, 2, 3)]
    models = [
        PeftModel.from_pretrained(TinyCausalLM(hidden_size=16, num_layers=2).build(), str(folder)).eval()
        for folder in folders
    ]
    for earlier, later in zip(models, models[1:], strict=False):
        now = dict(later.named_parameters())
        for name, old in earlier.named_parameters():
            if "lora_A" in name:
                assert torch.equal(now[name][: len(old)], old) and len(now[name]) == len(old) + 2
            elif "lora_B" in name:
                assert torch.equal(now[name][:, : old.shape[1]], old)
                assert now[name][:, old.shape[1] :].abs().max() > 0  # the new pair learnt
    ids = torch.randint(3, 250, (2, 7))
    run.module.eval()
    with torch.no_grad():
        assert torch.equal(models[2](ids).logits, run.module.model(ids).logits)  # type: ignore[misc]
    assert scaling_of(models[2]) == 2.0


def test_only_the_new_pair_trains_and_starts_at_nothing(sequence: Callable[..., StageLoop]) -> None:
    run = sequence("OLoRA")
    module, strategy = run.module, run.module.strategy
    assert isinstance(strategy, OLoRA)
    strategy.start(module, run.data[0], 1)
    assert strategy.penalty(module, {}, torch.zeros(())) is None
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    strategy.end_stage(module, run.data[0], 1)
    batch = strategy.collate(module, run.data[0].train_rows[:2])
    before = module.outputs(batch)
    strategy.start(module, run.data[1], 2)
    assert torch.equal(module.outputs(batch), before)
    assert all(".new." in name for name, parameter in module.named_parameters() if parameter.requires_grad)
    penalty = strategy.penalty(module, {}, torch.zeros(()))
    assert penalty is not None
    expected = sum(o.square().sum() for o in strategy.overlaps(module))
    torch.testing.assert_close(penalty, strategy.weight * expected)
    strategy.end_stage(module, run.data[1], 2)
    torch.testing.assert_close(module.outputs(batch), before)


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_stays_as_it_was(rslora: bool, configure: Callable[..., str], tmp_path: Path) -> None:
    from continual.config import experiment

    override = f"model.adapter.init_args.use_rslora={str(rslora).lower()}"
    run = StageLoop(experiment.parse(configure("OLoRA"), "strategy", [override]), tmp_path / "run")
    run.prepare()
    run.run()
    backbone = TinyCausalLM(hidden_size=16, num_layers=2).build()
    loaded = PeftModel.from_pretrained(backbone, str(tmp_path / "run" / "adapters" / "stage-02"))
    assert scaling_of(loaded) == pytest.approx(4 / 2**0.5 if rslora else 2.0, rel=1e-15)
