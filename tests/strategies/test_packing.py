"""Packed rows: what the padded batch computes, each row blind to the others; and who cannot have it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LilyConfig, LoraConfig, PolyConfig, PromptTuningConfig
from spreading import spread
from torch import Tensor
from transformers import AutoModelForCausalLM, Lfm2Config, OPTConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from continual.backbones import TinyCausalLM
from continual.config import experiment
from continual.data.batch import Row
from continual.data.collate import Collator
from continual.data.packing import PackedCollator, check_packing
from continual.data.stage_data import StageData
from continual.engine.stage_loop import StageLoop
from continual.errors import ConfigError
from continual.strategies.bank_parts import bank_of
from continual.training import cuda_graphs
from continual.training.module import ContinualModule

BANK: dict[str, Any] = {"instruction_encoder": "backbone", "depth": 0.5, "probe_rows": 4, "background_rows": 0}
Prepared = Callable[..., tuple[ContinualModule, list[StageData]]]


def packed(data: StageData, rows: list[Row], multiple: int = 1) -> dict[str, Any]:
    return data._packed_collator(multiple=multiple)(rows)


def mixed(stages: list[StageData]) -> list[Row]:
    """Rows of two stages, and so of two instructions, and one row without an instruction; no two are as long."""
    rows = [stages[0].train_rows[0], stages[1].train_rows[1], stages[0].train_rows[1], stages[1].train_rows[0]]
    rows = [
        Row(row.source, row.instruction, [70] * 9 * place + row.prompt_ids, row.answer_ids)
        for place, row in enumerate(rows)
    ]
    rows[2].instruction = ""
    assert len({row.length for row in rows}) == len(rows)
    return rows


def computed(module: ContinualModule, batch: dict[str, Any]) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Return a batch's loss, the logits of its answers, the gradients and the routes of its tokens, by the block."""
    record: list[dict[str, list[Tensor]]] = []
    if module.tuner is not None:
        with module.tuner.record_routes() as record:
            outputs = module.outputs(batch)
    else:
        outputs = module.outputs(batch)
    loss = module.loss(batch, outputs)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    routes = [route.detach() for passed in record for blocks in passed.values() for route in blocks]
    answers = module.answer_outputs(batch, outputs).detach()
    return loss.detach(), answers, [g for g in gradients if g is not None], routes


def second_stage(sequence: Callable[..., StageLoop]) -> tuple[ContinualModule, list[StageData]]:
    """A growing bank that has learnt one stage and is about to learn the next, whose slice reads the first one's."""
    made = sequence("GrowingBank", "queryable", **BANK)
    made.begin(1, made.data)
    made._fit(1)
    made.module.strategy.start(made.module, made.data[1], 2)
    bank_of(made.module).in_use = ["default", "stage02"]
    return made.module, made.data


@pytest.mark.parametrize("kind", ["lora", "queryable", "checkpointed", "experts", "bank"])
def test_packed_rows_give_the_padded_losses_gradients_and_routes(
    prepared: Prepared, sequence: Callable[..., StageLoop], kind: str
) -> None:
    adapter = "queryable" if kind == "checkpointed" else kind
    module, stages = second_stage(sequence) if kind == "bank" else prepared("Sequential", adapter)
    module.train()
    spread(module, 0.3)
    rows = mixed(stages)
    expected = computed(module, stages[0].collate(rows))
    if kind == "checkpointed":
        assert module.model is not None
        module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module.model.enable_input_require_grads()
    batch = packed(stages[0], rows)
    assert batch["forward"]["input_ids"].shape == (1, sum(row.length for row in rows))
    found = computed(module, batch)
    torch.testing.assert_close(found[:3], expected[:3], rtol=1e-4, atol=1e-5)
    lengths = torch.tensor([row.length for row in rows])
    tokens = torch.arange(int(lengths.max())) < lengths.unsqueeze(1)
    assert len(found[3]) == len(expected[3]) >= (kind != "lora")
    for route, padded in zip(found[3], expected[3], strict=True):
        torch.testing.assert_close(route[0], padded[tokens], rtol=1e-4, atol=1e-5)
    if kind in ("queryable", "bank"):  # an instruction counts, so that a token that got another's would show
        batch["forward"]["row_of_token"] = torch.zeros_like(batch["forward"]["row_of_token"])
        assert (computed(module, batch)[1] - expected[1]).abs().max() > 1e-3


@pytest.mark.parametrize("adapter", ["lora", "queryable", "experts"])
def test_a_row_does_not_see_the_others(prepared: Prepared, adapter: str) -> None:
    module, stages = prepared("Sequential", adapter)
    spread(module, 0.3)
    rows = mixed(stages)
    before = computed(module, packed(stages[0], rows))[1].split([len(row.answer_ids) for row in rows])
    rows[1].prompt_ids = [(token + 3) % 200 + 20 for token in rows[1].prompt_ids]
    after = computed(module, packed(stages[0], rows))[1].split([len(row.answer_ids) for row in rows])
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [True, False, True, True]


def test_padding_behind_packed_rows_changes_nothing(prepared: Prepared) -> None:
    module, stages = prepared("Sequential", "queryable")
    spread(module, 0.3)
    rows = mixed(stages)
    batch = packed(stages[0], rows, multiple=64)
    assert batch["forward"]["input_ids"].shape[1] % 64 == 0 != sum(row.length for row in rows) % 64
    torch.testing.assert_close(computed(module, batch)[:3], computed(module, packed(stages[0], rows))[:3])
    module.compiles = stages[0].packing = True
    lengths = {batch["forward"]["input_ids"].shape[1] for batch in stages[0].train_dataloader()}
    assert all(length % 8 == 0 for length in lengths)


def test_the_experts_loss_counts_no_padding(prepared: Prepared) -> None:
    module, stages = prepared("Sequential", "experts")
    spread(module, 0.3)
    module.train()
    assert module.balances_experts
    rows = mixed(stages)
    padded = stages[0].collate(rows)
    assert padded["forward"]["token_mask"].sum(dim=1).tolist() == [row.length for row in rows]
    layouts = [padded, cuda_graphs._padded(padded)[0], packed(stages[0], rows), packed(stages[0], rows, multiple=64)]
    losses = [module.training_pass(batch)[0] for batch in layouts]
    torch.testing.assert_close(losses, losses[:1] * 4, rtol=1e-5, atol=1e-6)
    del padded["forward"]["token_mask"]
    assert (module.training_pass(padded)[0] - losses[0]).abs() > 1e-4


def test_every_process_packs_its_own_rows(prepared: Prepared) -> None:
    module, stages = prepared("Sequential", "queryable")
    spread(module, 0.3)
    rows = mixed(stages)
    whole = computed(module, packed(stages[0], rows))[0]
    parts = [stages[0]._packed_collator(slice(rank, None, 3))(rows) for rank in range(3)]
    mean = sum(computed(module, part)[0] * part["weight"] for part in parts) / 3
    torch.testing.assert_close(mean, whole)


def test_a_gate_does_not_choose_for_packed_rows(prepared: Prepared) -> None:
    module, (data, *_) = prepared("GrowingBank", "queryable", **BANK)
    with pytest.raises(ValueError, match="^a gate cannot choose slices for rows that are packed into one"):
        module.outputs(packed(data, data.train_rows[:2]))


# -- a whole run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "adapter"), [("ExperienceReplay", "queryable"), ("LwF", "lora"), ("GrowingBank", "queryable")]
)
def test_a_packed_run_learns_what_a_padded_one_does(
    configure: Callable[..., str], tmp_path: Path, strategy: str, adapter: str
) -> None:
    tree = yaml.safe_load(configure(strategy, adapter, **(BANK if strategy == "GrowingBank" else {})))
    runs = []
    for packing in (False, True):
        tree["data"]["packing"] = packing
        run = StageLoop(experiment.parse(yaml.safe_dump(tree), "run"), tmp_path / f"packing-{packing}")
        run.prepare()
        run.run()
        assert ("position_ids" in next(iter(run.data[0].train_dataloader()))["forward"]) == packing
        runs.append(run)
    padded, found = ([row["value"] for row in run.scores.rows] for run in runs)
    assert found == pytest.approx(padded, abs=1e-4)
    trained = [[p.detach() for p in run.module.parameters() if p.requires_grad] for run in runs]
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-3, atol=1e-4)


# -- who cannot have it -----------------------------------------------------------------------------------------------


class Other(TinyCausalLM):
    """Another architecture of random weights."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config

    def _random_model(self) -> PreTrainedModel:
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(self.config).to(getattr(torch, self.dtype))


def check(backbone: TinyCausalLM, adapter: Any) -> None:
    module = ContinualModule(backbone, adapter)
    module.configure_model()
    task_id = 0 if module.takes_task_ids else None
    plain = Collator(backbone, False, answers=True, task_id=task_id)
    packed = PackedCollator(backbone, False, answers=True, task_id=task_id)
    state = torch.get_rng_state()
    check_packing(module, plain, packed)
    assert torch.equal(torch.get_rng_state(), state)  # a run's randomness does not depend on the layout of its batches


SIZES: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
GLU: dict[str, Any] = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "initializer_range": 0.1}


@pytest.mark.parametrize(
    ("backbone", "adapter"),
    [
        (TinyCausalLM(num_layers=2, attn_implementation="eager"), LoraConfig(target_modules=["q_proj"])),
        (TinyCausalLM(num_layers=2, dtype="bfloat16"), LoraConfig(target_modules=["q_proj"])),
        (
            Other(Qwen2Config(**GLU, use_sliding_window=True, sliding_window=4, max_window_layers=0)),
            LoraConfig(target_modules=["q_proj"]),
        ),
        (TinyCausalLM(num_layers=2), PolyConfig(target_modules=["q_proj"], n_tasks=2)),
    ],
    ids=["eager", "bfloat16", "sliding window", "task ids"],
)
def test_models_that_keep_rows_apart_are_taken(backbone: TinyCausalLM, adapter: Any) -> None:
    check(backbone, adapter)


@pytest.mark.parametrize(
    ("backbone", "adapter"),
    [
        (Other(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32)), LoraConfig(target_modules=["q_proj"])),
        (Other(Lfm2Config(**GLU, layer_types=["conv", "full_attention"])), LoraConfig(target_modules=["q_proj"])),
        (TinyCausalLM(num_layers=2), PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")),
        (TinyCausalLM(num_layers=2), LilyConfig(r=4, target_modules=["q_proj", "v_proj"])),
    ],
    ids=["a mask without positions", "a convolution", "virtual tokens", "routes averaged over tokens"],
)
@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def test_models_that_do_not_are_refused(backbone: TinyCausalLM, adapter: Any) -> None:
    with pytest.raises(ConfigError, match=r"^data\.packing: \w+ with \w+ does not compute of packed rows what it"):
        check(backbone, adapter)


def test_a_regressor_is_refused_before_anything_is_written(configure: Callable[..., str], tmp_path: Path) -> None:
    tree = yaml.safe_load(configure("Sequential", "regressor"))
    tree["data"]["packing"] = True
    run = StageLoop(experiment.parse(yaml.safe_dump(tree), "run"), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"^stages\.task0: data\.packing lays tokens into one sequence, and a regr"):
        run.prepare()
    assert not (tmp_path / "run").exists()
