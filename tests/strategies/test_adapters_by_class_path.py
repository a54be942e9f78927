"""Any PEFT method is an adapter by its class path: it trains two stages, and a killed run goes on to the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from continual.adapters import FullFineTuningConfig
from continual.backbones import MLPRegressor, TinyCausalLM
from continual.config import experiment
from continual.engine.stage_loop import StageLoop
from continual.errors import ConfigError, RunError
from continual.runtime.parameters import adapter_tensors
from continual.storage import manifest, records

REGRESSION = Path(__file__).parents[2] / "configs" / "regression.yaml"
QV: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("peft.LoraConfig", {"r": 4, **QV}),
    "rsLoRA": ("peft.LoraConfig", {"r": 4, "use_rslora": True, **QV}),
    "DoRA": ("peft.LoraConfig", {"r": 4, "use_dora": True, **QV}),
    "AdaLoRA": ("peft.AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 9, "tfinal": 2, **QV}),
    "VeRA": ("peft.VeraConfig", {"r": 8, "projection_prng_key": 3, **QV}),
    "VB-LoRA": ("peft.VBLoRAConfig", {"r": 2, "num_vectors": 8, "vector_length": 8, "topk": 2, **QV}),
    "Lily": ("peft.LilyConfig", {"r": 4, "stride_A": 2, "num_B": 2, **QV}),
    "Poly": ("peft.PolyConfig", {"r": 4, "n_tasks": 2, "n_skills": 2, "n_splits": 1, **QV}),
    "IA3": ("peft.IA3Config", {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    "full": ("continual.adapters.FullFineTuningConfig", {}),
}  # fmt: skip


@pytest.fixture
def configuration(configure: Callable[..., str]) -> Callable[..., str]:
    """Return a maker of configurations with an adapter of ``ADAPTERS``, in steps large enough to see."""

    def make(adapter: str, **changes: Any) -> str:
        class_path, init_args = ADAPTERS[adapter]
        tree: dict[str, Any] = yaml.safe_load(configure("Sequential", rows=12))
        tree["model"]["adapter"] = {"class_path": class_path, "init_args": init_args | changes}
        tree["model"]["optimizer"]["init_args"]["lr"] = 0.003 if adapter == "full" else 0.03
        tree["trainer"]["max_epochs"] = 4
        return yaml.safe_dump(tree)

    return make


def prepared(text: str, folder: Path, state: manifest.Manifest | None = None) -> StageLoop:
    """Return a run that is ready to go."""
    run = StageLoop(experiment.parse(text, "adapters"), folder)
    run.prepare(state)
    return run


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_trains_two_stages_and_resumes(
    adapter: str, configuration: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = prepared(configuration(adapter), whole)
    start = {name: tensor.clone() for name, tensor in adapter_tensors(run.module).items()}
    run.run()
    losses = records.read(whole, "gradients").query("metric == 'train_loss'")
    for _, stage in losses.groupby("stage"):
        values = stage.sort_values("step")["value"].to_numpy()
        assert values[-3:].mean() < values[:3].mean()
    assert any(not torch.equal(start[name], tensor) for name, tensor in adapter_tensors(run.module).items())

    killed = prepared(configuration(adapter), cut)
    with monkeypatch.context() as patch:

        def stop(sequence: StageLoop, index: int, *arguments: Any) -> None:
            if index == 2:
                raise KeyboardInterrupt
            score(sequence, index, *arguments)

        score = StageLoop._score
        patch.setattr(StageLoop, "_score", stop)
        with pytest.raises(KeyboardInterrupt):
            killed.run()
    state, resolved = manifest.read(cut)
    assert state.finished_stage == 1
    prepared(resolved, cut, state).run()
    for table in ("scores", "answers", "gradients"):
        assert (whole / f"{table}.parquet").read_bytes() == (cut / f"{table}.parquet").read_bytes(), table
    last = "adapters/stage-02/adapter_model.safetensors"
    assert (whole / last).read_bytes() == (cut / last).read_bytes()


def singular_values(run: StageLoop) -> torch.Tensor:
    """Return AdaLoRA's singular values, (modules, init_r)."""
    tensors = adapter_tensors(run.module)
    return torch.stack([tensor.flatten() for name, tensor in tensors.items() if "lora_E" in name])


def test_adalora_hands_out_ranks_within_each_stage(
    configuration: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(configuration("AdaLoRA"), tmp_path / "run")
    ranks: dict[int, list[int]] = {}
    step_end = type(run.module).on_train_batch_end

    def watch(module: Any, *arguments: Any) -> None:
        step_end(module, *arguments)
        ranks.setdefault(module.strategy.stage, []).append(int((singular_values(run) != 0).sum()))

    monkeypatch.setattr(type(run.module), "on_train_batch_end", watch)
    run.run()
    modules = len(singular_values(run))
    for stage in (1, 2):
        assert ranks[stage][0] > ranks[stage][-1] == 2 * modules  # from init_r 4 down to target_r 2 a module
    config: Any = run.module.model.peft_config["default"]  # type: ignore[union-attr]
    assert config.total_step == len(ranks[2])
    backbone = TinyCausalLM(hidden_size=16, num_layers=2).build()
    folder = str(run.run_dir / "adapters" / "stage-02")
    alone = PeftModel.from_pretrained(backbone, folder).eval()
    ids = torch.randint(3, 250, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(alone(ids).logits, run.module.model.eval()(ids).logits)  # type: ignore[union-attr]


def test_adalora_without_room_for_its_schedule(configuration: Callable[..., str], tmp_path: Path) -> None:
    run = prepared(configuration("AdaLoRA", total_step=1000, tinit=500), tmp_path / "run")
    with pytest.raises(RunError, match=r"tinit \(500\) and tfinal \(2\) leave none of the stage's 12 steps"):
        run.run()


def test_poly_is_told_the_task(configuration: Callable[..., str], tmp_path: Path) -> None:
    run = prepared(configuration("Poly", n_tasks=1), tmp_path / "run")
    assert [data.collate(data.train_rows[:2])["forward"]["task_ids"].tolist() for data in run.data] == [[0, 0], [0, 0]]
    run = prepared(configuration("Poly"), tmp_path / "two")
    assert [data.collate(data.train_rows[:2])["forward"]["task_ids"].tolist() for data in run.data] == [[0, 0], [1, 1]]


def test_poly_serves_no_regressor(tmp_path: Path) -> None:
    tree = yaml.safe_load(REGRESSION.read_text())
    tree["model"]["adapter"] = {"class_path": "peft.PolyConfig", "init_args": {"target_modules": ["linear"]}}
    with pytest.raises(ConfigError, match="serves language models alone"):
        prepared(yaml.safe_dump(tree), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_full_fine_tuning_trains_every_block_weight_and_gives_the_backbone_back() -> None:
    backbone = TinyCausalLM(dtype="bfloat16").build()
    own = {name for name, _ in backbone.named_parameters()}
    model = get_peft_model(backbone, FullFineTuningConfig(task_type="CAUSAL_LM"))
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    copied = {name.removeprefix("base_model.model.").replace("full_copy.default.", "") for name in trains}
    assert copied == {name for name in own if "embed_tokens" not in name and "lm_head" not in name}
    ids = torch.randint(3, 250, (2, 9))
    first = model(ids).logits
    torch.testing.assert_close(first, TinyCausalLM(dtype="bfloat16").build()(ids).logits)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    model(ids).logits.float().square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter -= 0.1 * parameter.grad.sign()
    changed = model(ids).logits
    assert not torch.equal(changed, first)
    with model.disable_adapter():
        torch.testing.assert_close(model(ids).logits, first)
    torch.testing.assert_close(model.merge_and_unload()(ids).logits, changed)


def test_full_fine_tuning_is_saved_and_loaded_by_peft(tmp_path: Path) -> None:
    model = get_peft_model(MLPRegressor(hidden_size=8).build(), FullFineTuningConfig(target_modules=["linear"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    model.save_pretrained(str(tmp_path))
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        f"base_model.model.layers.{layer}.linear.full_copy.{part}" for layer in range(4) for part in ("weight", "bias")
    }
    again = PeftModel.from_pretrained(MLPRegressor(hidden_size=8).build(), str(tmp_path), adapter_name="other")
    x = torch.randn(3, 10)
    torch.testing.assert_close(again(x), model(x))


def test_full_fine_tuning_refuses_tied_weights() -> None:
    with pytest.raises(ValueError, match="shares its weights"):
        get_peft_model(TinyCausalLM().build(), FullFineTuningConfig(target_modules=["embed_tokens"]))
