"""SEQR chooses exactly the update of the largest norm, token by token, and answers with that one alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file

from continual.backbones import TinyCausalLM
from continual.engine.stage_loop import StageLoop
from continual.strategies import SEQR
from continual.strategies.plain_lora import lora_layers
from continual.strategies.seqr import Library


def library_of(num_stages: int, rank: int, d_out: int, norms: list[torch.Tensor] | None = None) -> Library:
    """Return a library of random updates."""
    empty = torch.zeros(0)
    library = Library(torch.zeros(0, d_out, rank), torch.zeros(0, min(rank, d_out), rank), empty, empty)
    for stage in range(num_stages):
        B = torch.randn(d_out, rank)
        library = library.add(B, torch.linalg.qr(B).R, norms[stage] if norms else None)
    return library


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 5), st.integers(1, 9))
def test_choice_equals_the_brute_force_argmax(seed: int, num_stages: int, rank: int, d_out: int) -> None:
    torch.manual_seed(seed)
    library = library_of(num_stages, rank, d_out)
    u = torch.randn(3, 7, rank)
    norms = torch.stack([(u @ B.T).norm(dim=-1) for B in library.B], dim=-1)
    chosen = library.choose(u)
    picked = norms.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(picked, norms.amax(dim=-1))  # the same one, or one that ties with it to rounding
    clear = norms.topk(min(2, num_stages), dim=-1).values
    clear = (clear[..., 0] - clear[..., -1] > 1e-4) | (num_stages == 1)
    assert torch.equal(chosen[clear], norms.argmax(dim=-1)[clear])
    alone = torch.stack([u @ B.T for B in library.B], dim=-2)
    expected = alone.gather(-2, chosen[..., None, None].expand(3, 7, 1, d_out)).squeeze(-2)
    torch.testing.assert_close(library.update(u), expected)


def test_calibration_compares_each_norm_with_its_own_stage() -> None:
    norms = [torch.tensor([9.0, 10.0, 11.0]), torch.tensor([0.9, 1.0, 1.1])]
    library = library_of(2, 3, 5, norms)
    torch.testing.assert_close(library.mean, torch.tensor([10.0, 1.0]))
    torch.testing.assert_close(library.std, torch.tensor([1.0, 0.1]))
    u = torch.randn(20, 3)
    brute = torch.stack([((u @ B.T).norm(dim=-1) - n.mean()) / n.std() for B, n in zip(library.B, norms, strict=True)])
    assert torch.equal(library.choose(u), brute.argmax(dim=0))


def test_stages_share_a_frozen_a_and_each_folder_is_its_own_lora(sequence: Callable[..., StageLoop]) -> None:
    run = sequence("SEQR", num_stages=3, calibration_rows=2)
    run.run()
    strategy = run.module.strategy
    assert isinstance(strategy, SEQR)
    weights = [
        load_file(run.run_dir / "adapters" / f"stage-{stage:02d}" / "adapter_model.safetensors") for stage in range(4)
    ]
    for name, first in weights[0].items():
        if "lora_A" in name:
            assert all(torch.equal(first, later[name]) for later in weights)
    for name, library in strategy.libraries.items():
        key = f"{name.removeprefix('model.')}.lora_B.weight"
        for stage in (1, 2, 3):
            assert torch.equal(library.B[stage - 1], weights[stage][key])
            assert library.B[stage - 1].abs().max() > 0
    assert run.module.parameter_counts()["trainable_parameters"] == sum(
        tensor.numel() for name, tensor in weights[3].items() if "lora_B" in name
    )


def test_routed_model_is_the_chosen_stages_own_where_all_tokens_agree(sequence: Callable[..., StageLoop]) -> None:
    run = sequence("SEQR", calibrate=False)
    run.run()
    strategy = run.module.strategy
    assert isinstance(strategy, SEQR)
    for library in strategy.libraries.values():  # the first stage's norms are made to win everywhere
        library.mean[0] = -1e6
    folder = str(run.run_dir / "adapters" / "stage-01")
    alone = PeftModel.from_pretrained(TinyCausalLM(hidden_size=16, num_layers=2).build(), folder).eval()
    strategy.route(run.module)
    ids = torch.randint(3, 250, (2, 7))
    model = run.module.model
    assert model is not None
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, alone(ids).logits)
    strategy.begin_stage(run.module, run.data[0], 3)
    assert all(not layer.lora_B["default"]._forward_hooks for layer in lora_layers(run.module).values())


def test_what_is_stored_grows_by_a_stage_s_b_and_what_is_served_by_its_r_factor(
    sequence: Callable[..., StageLoop],
) -> None:
    run = sequence("SEQR", num_stages=3)
    run.run()
    layers = lora_layers(run.module).values()
    of_A = sum(layer.lora_A["default"].weight.numel() for layer in layers)
    of_B = sum(layer.lora_B["default"].weight.numel() for layer in layers)
    of_R = sum(min(layer.r["default"], layer.out_features) * layer.r["default"] + 2 for layer in layers)
    stored, served = run.manifest.stored_parameters, run.manifest.serving_parameters
    assert [stored[str(stage)] for stage in (1, 2, 3)] == [of_A + stage * (of_B + of_R) for stage in (1, 2, 3)]
    assert [served[str(stage)] for stage in (1, 2, 3)] == [of_A + of_B + stage * of_R for stage in (1, 2, 3)]
