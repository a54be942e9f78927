"""During training: the loss, each layer's adapter gradient norm, and how concentrated the gradient is."""

from __future__ import annotations

import math
import re
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from continual.adapters.routed_linear import layer_of as layer_of_module
from continual.compat.torch import each_norm
from continual.errors import DIVERGED, RunError
from continual.interfaces import Recorder, Rows, StageContext
from continual.runtime import distributed


def layer_of(parameter_name: str) -> str:
    """Return the layer that an adapter's parameter belongs to, or "bank" for one that lies outside the backbone.

    The layer is the module's name up to its last index, "model.layers.3" of
    "base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight", or the module where there is none, "head".
    """
    path = parameter_name.removeprefix("base_model.model.")
    return "bank" if path == parameter_name else layer_of_module(re.sub(r"\.\w+\.default(\.\w+)?$", "", path))


class GradientRecorder(Recorder):
    """Records the training loss and the concentration each step, and every layer's norm each ``interval`` steps.

    A layer's norm is that of all its adapter gradients (A and B of its projections) before clipping; the bank, shared
    by all layers, has a row of its own. Concentration = largest layer norm / mean layer norm, the bank left out.

    A loss that is not finite ends the stage. On a GPU, losses are looked at every few steps, so that the device never
    waits for the host; the step that is named is the first bad one.

    Args:
        interval: Steps between two records of every layer's norm.
    """

    def __init__(self, interval: int = 10) -> None:
        self.interval = interval
        self.rows: Rows = []
        self._pending: list[tuple[int, int, Tensor, Tensor]] = []

    def begin(self, context: StageContext) -> None:
        """Begin a stage."""
        self.keys, self.rows, self._pending = context.keys, [], []

    def tables(self) -> dict[str, Rows]:
        """Return the rows of the table ``gradients``."""
        return {"gradients": self.rows}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Group the trainable parameters by layer."""
        layers: dict[nn.Parameter, set[str]] = {}  # a bank may hang in every layer (VB-LoRA's does)
        for name, parameter in pl_module.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                layers.setdefault(parameter, set()).add(layer_of(name.removeprefix("model.")))
        self._parameters = list(layers)
        names = [min(found) if len(found) == 1 else "bank" for found in layers.values()]
        self._layers = list(dict.fromkeys(names))
        self._index = torch.tensor([self._layers.index(name) for name in names])
        self._own = torch.tensor([name != "bank" for name in self._layers])
        self._losses: list[Tensor] = []
        self._norms: Tensor | None = None

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the norms of this step, on the device."""
        zero = torch.zeros((), device=pl_module.device)
        gradients = [zero if p.grad is None else p.grad for p in self._parameters]
        self._norms = torch.stack([norm.float() for norm in each_norm(gradients)])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss; look at what is kept once in a while. A step may take several batches: their sum counts.

        Of several processes each has the loss of its share of a batch, scaled so that their mean is the batch's.
        """
        self._losses.append(outputs["loss"].detach())  # its share of the step's
        if self._norms is None:
            return
        loss = torch.stack(self._losses).sum()
        self._pending.append((trainer.global_step, trainer.current_epoch, loss, self._norms))
        self._losses, self._norms = [], None
        if loss.device.type == "cpu" or len(self._pending) >= 16:
            self._settle()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at what is left."""
        self._settle()

    def _settle(self) -> None:
        if not self._pending:
            return
        losses = distributed.mean(torch.stack([loss for _, _, loss, _ in self._pending])).tolist()
        for value, (step, epoch, _, norms) in zip(losses, self._pending, strict=True):
            if not math.isfinite(value):
                raise RunError(f"stage {self.keys['task']!r}, step {step}: {DIVERGED} ({value}); the stage is dropped")
            self._add(step, epoch, "train_loss", "", value, 1, "lower")
            # On the CPU: a GPU adds up in an order that changes from run to run.
            squares = torch.zeros(len(self._layers), dtype=torch.float64)
            layer_norms = squares.index_add(0, self._index, norms.cpu().double().square()).sqrt()
            own = layer_norms[self._own]
            if len(own) and own.mean() > 0:
                self._add(step, epoch, "grad_concentration", "", (own.max() / own.mean()).item(), len(own))
            if step == 1 or step % self.interval == 0:
                counts = torch.bincount(self._index, minlength=len(self._layers)).tolist()
                for name, norm, count in zip(self._layers, layer_norms.tolist(), counts, strict=True):
                    self._add(step, epoch, "grad_norm", name, norm, count)
        self._pending.clear()

    def _add(
        self, step: int, epoch: int, metric: str, layer: str, value: float, count: int, direction: str = "none"
    ) -> None:
        self.rows.append(
            self.keys
            | {"step": step, "epoch": epoch, "layer": layer}
            | {"metric": metric, "direction": direction, "value": value, "count": count}
        )
