"""C-LoRA and N-LoRA: what each of them is defined by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners import lora

from continual.backbones import TinyCausalLM
from continual.engine.stage_loop import StageLoop
from continual.strategies import CLoRA, NLoRA
from continual.strategies.plain_lora import lora_layers


def pair_updates(run: StageLoop, stage: int) -> torch.Tensor:
    """Return B_i A_i of one stage of an N-LoRA run, all projections' weights in one vector."""
    parts = []
    for layer in lora_layers(run.module).values():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        parts.append((B[:, 2 * stage - 2 : 2 * stage] @ A[2 * stage - 2 : 2 * stage]).flatten())
    return torch.cat(parts).detach()


def collisions(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the share of weights that both updates move."""
    return ((first.abs() > 0.01) & (second.abs() > 0.01)).float().mean().item()


def test_nlora_updates_collide_less_the_larger_the_weight(sequence: Callable[..., StageLoop]) -> None:
    runs = [sequence("NLoRA", run=f"run{weight}", weight=weight) for weight in (0.0, 0.01, 0.1)]
    for run in runs:
        run.run()
    updates = [(pair_updates(run, 1), pair_updates(run, 2)) for run in runs]
    for stage in (0, 1):
        norms = [update[stage].abs().sum() for update in updates]
        assert norms[0] > norms[1] > norms[2]
    shares = [collisions(*update) for update in updates]
    assert shares[0] > shares[1] and shares[2] < 0.5 * shares[0]


def test_nlora_penalty_is_the_l1_norm_of_the_pair_that_trains(sequence: Callable[..., StageLoop]) -> None:
    run = sequence("NLoRA", weight=2.0)
    strategy, module = run.module.strategy, run.module
    assert isinstance(strategy, NLoRA)
    for stage in (1, 2):
        strategy.start(module, run.data[stage - 1], stage)
        new = [name for name, p in module.named_parameters() if p.requires_grad and "lora_B" in name]
        total = 0.0
        for name in new:
            parameters = dict(module.named_parameters())
            with torch.no_grad():
                parameters[name].normal_()
            total += (parameters[name] @ parameters[name.replace("lora_B", "lora_A")]).abs().sum().item()
        penalty = strategy.penalty(module, {}, torch.zeros(()))
        assert penalty is not None and penalty.item() == pytest.approx(2.0 * total, rel=1e-5)
        strategy.end_stage(module, run.data[stage - 1], stage)


@pytest.fixture
def clora(sequence: Callable[..., StageLoop], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a maker of finished C-LoRA runs; the last stage's ``overlap`` is noted on it."""

    def make(name: str, **init_args: Any) -> Any:
        run: Any = sequence("CLoRA", run=name, **init_args)
        end = CLoRA.end_stage

        def note(self: CLoRA, *arguments: Any) -> None:
            run.overlap = sum(float(routing.overlap().detach()) for routing in self.routings.values())
            end(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(CLoRA, "end_stage", note)
            run.run()
        return run

    return make


def test_clora_overlap_falls_with_the_weight(clora: Callable[..., Any]) -> None:
    runs = [clora(f"run{weight}", weight=weight) for weight in (0.0, 1.0, 100.0)]
    overlaps = [run.overlap for run in runs]
    assert overlaps[0] > overlaps[1] > overlaps[2] and overlaps[2] < 0.3 * overlaps[0]


def test_clora_is_lora_with_a_routing_matrix_between_its_factors(clora: Callable[..., Any]) -> None:
    run = clora("run", train_subspace=False)
    folders = [str(run.run_dir / "adapters" / f"stage-{stage:02d}") for stage in (1, 2)]
    build = TinyCausalLM(hidden_size=16, num_layers=2).build
    first, second = (PeftModel.from_pretrained(build(), folder).eval() for folder in folders)
    layers: list[Any] = [part for part in second.modules() if isinstance(part, lora.Linear)]
    for (name, one), (_, two) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, two), name  # A and B are those of the first stage
    with torch.no_grad():
        for layer, routing in zip(layers, run.module.strategy.routings.values(), strict=True):
            assert not torch.equal(routing.old, torch.eye(2)) and not routing.new.any()
            layer.lora_A["default"].weight.copy_(routing.old @ layer.lora_A["default"].weight)
        ids = torch.randint(3, 250, (2, 7))
        torch.testing.assert_close(run.module.model.eval()(input_ids=ids).logits, second(ids).logits)
    sizes = run.manifest.stored_parameters
    assert sizes["1"] == sizes["2"]  # however many stages there are


def test_stored_parameters_say_what_serves_the_model(sequence: Callable[..., StageLoop]) -> None:
    sizes: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
    for strategy in ("Sequential", "OLoRA", "SEQR", "EWC"):
        run = sequence(strategy, run=strategy)
        run.run()
        sizes[strategy] = (run.manifest.stored_parameters, run.manifest.serving_parameters)
    trains = run.manifest.model["trainable_parameters"]
    assert sizes["Sequential"][0] == sizes["EWC"][0] == {"1": trains, "2": trains}
    assert sizes["OLoRA"][0] == sizes["OLoRA"][1] == {"1": trains, "2": 2 * trains}
    stored, serving = sizes["SEQR"]
    assert trains < serving["2"] < stored["2"] < 2 * trains + 100 and stored["1"] == serving["1"]
