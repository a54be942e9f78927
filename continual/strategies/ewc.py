"""Elastic weight consolidation: parameters that mattered to earlier stages are pulled back to where they were.

EWC: Kirkpatrick et al. 2017, arXiv 1612.00796, equation 3, one term for each earlier stage k:

    weight / 2 sum_k sum_i F_k,i (theta_i - theta*_k,i)^2

Online EWC: Schwarz et al. 2018, 'Progress & Compress', arXiv 1805.06370, section 4: one running term,

    F~_k = decay F~_(k-1) + F_k,        weight / 2 sum_i F~_i (theta_i - theta*_i)^2,      theta* from the last stage
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from continual.errors import ConfigError, RunError
from continual.runtime.parameters import evaluating, flat, load_tensors, save_tensors, trainable
from continual.strategies.base import Strategy, require_at_least
from continual.strategies.fisher import Estimator, fisher_diagonal

if TYPE_CHECKING:
    from continual.data.stage_data import StageData
    from continual.interfaces import AdaptedModule

_LARGEST_EXACT = 4096  # vocabulary: 'exact' takes a backward pass for each token of it, at each token of each answer


class EWC(Strategy):
    """One quadratic penalty for each earlier stage (see the module's docstring).

    Stores: 8 x (trainable parameters) bytes a stage: the Fisher diagonal and the parameters, float32.

    Args:
        weight: Weight of the penalty, at least 0.
        estimator: Of the Fisher diagonal over the answers' tokens: "exact", "sampled" or "empirical" (``fisher``).
        fisher_rows: Training rows that it is estimated from; null for all.
    """

    def __init__(self, weight: float = 1000.0, estimator: Estimator = "sampled", fisher_rows: int | None = 200) -> None:
        require_at_least(0, weight=weight)
        if fisher_rows is not None:
            require_at_least(1, fisher_rows=fisher_rows)
        self.weight, self.fisher_rows = weight, fisher_rows
        self.estimator: Estimator = estimator
        self.fisher_KP = self.anchor_KP = torch.zeros(0, 0)

    def check(self, module: AdaptedModule, stages: Sequence[StageData]) -> None:
        """Raise ConfigError where the exact Fisher would take too many backward passes."""
        vocabulary = len(module.backbone.tokenizer) if module.backbone.kind == "causal_lm" else 0  # type: ignore
        if self.estimator == "exact" and vocabulary > _LARGEST_EXACT:
            raise ConfigError(
                f"model.strategy: estimator 'exact' takes a backward pass for each of the vocabulary's {vocabulary} "
                f"tokens (at most {_LARGEST_EXACT}): take 'sampled'"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Move what is kept to the device, once."""
        self.fisher_KP, self.anchor_KP = self.fisher_KP.to(pl_module.device), self.anchor_KP.to(pl_module.device)

    def penalty(self, module: AdaptedModule, batch: dict[str, Any], outputs: Tensor) -> Tensor | None:
        """Return the pull towards where earlier stages left the parameters."""
        if not len(self.fisher_KP):
            return None
        distance_KP = flat(trainable(module)) - self.anchor_KP
        return 0.5 * self.weight * (self.fisher_KP * distance_KP.square()).sum()

    def end_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Estimate the stage's Fisher diagonal where its training ended."""
        generator = torch.Generator().manual_seed(data.seed)
        with evaluating(module), torch.enable_grad():
            fisher_P = fisher_diagonal(self._rows(module, data), trainable(module), self.estimator, generator)
        self.keep(fisher_P.cpu(), flat([parameter.detach() for parameter in trainable(module)]).cpu())

    def keep(self, fisher_P: Tensor, anchor_P: Tensor) -> None:
        """Add the stage's term to those kept."""
        earlier = [(kept.cpu(), new) for kept, new in ((self.fisher_KP, fisher_P), (self.anchor_KP, anchor_P))]
        self.fisher_KP, self.anchor_KP = (
            torch.cat([kept.reshape(-1, len(new)), new.unsqueeze(0)]) for kept, new in earlier
        )

    def _rows(self, module: AdaptedModule, data: StageData) -> Iterator[tuple[Tensor, Tensor]]:
        rows = data.train_rows
        num_rows = len(rows) if self.fisher_rows is None else min(self.fisher_rows, len(rows))
        for row in random.Random(data.seed).sample(rows, num_rows):
            batch = self.collate(module, [row])
            yield module.answer_outputs(batch, module.outputs(batch)), module.answer_outputs(batch, batch["labels"])

    def write(self, folder: Path) -> None:
        """Write the terms."""
        save_tensors(folder, {"fisher": self.fisher_KP, "anchor": self.anchor_KP})

    def read(self, module: AdaptedModule, folder: Path) -> None:
        """Read the terms."""
        tensors = load_tensors(folder)
        self.fisher_KP, self.anchor_KP = tensors["fisher"], tensors["anchor"]
        num_trainable = sum(parameter.numel() for parameter in trainable(module))
        if self.fisher_KP.shape[1:] != (num_trainable,) or self.anchor_KP.shape != self.fisher_KP.shape:
            raise RunError(f"what the strategy kept in {folder} does not fit {num_trainable} trainable parameters")


class OnlineEWC(EWC):
    """One running quadratic penalty for all earlier stages (see the module's docstring).

    Stores: 8 x (trainable parameters) bytes in all, however many stages.

    Args:
        weight: Weight of the penalty, at least 0.
        decay: What is left of the earlier stages' Fisher diagonal after each stage, in [0, 1].
        estimator: Of the Fisher diagonal over the answers' tokens: "exact", "sampled" or "empirical" (``fisher``).
        fisher_rows: Training rows that it is estimated from; null for all.
    """

    def __init__(
        self,
        weight: float = 1000.0,
        decay: float = 0.9,
        estimator: Estimator = "sampled",
        fisher_rows: int | None = 200,
    ) -> None:
        super().__init__(weight, estimator, fisher_rows)
        if not 0 <= decay <= 1:
            raise ValueError(f"model.strategy.decay must lie in [0, 1], got {decay:g}")
        self.decay = decay

    def keep(self, fisher_P: Tensor, anchor_P: Tensor) -> None:
        """Let the stage's term run into the one kept."""
        if len(self.fisher_KP):
            fisher_P = self.decay * self.fisher_KP[0].cpu() + fisher_P
        self.fisher_KP, self.anchor_KP = fisher_P.unsqueeze(0), anchor_P.unsqueeze(0)
