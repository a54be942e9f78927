"""During training: the loss, each layer's adapter gradient norm, and how concentrated the gradient is."""

from __future__ import annotations

import re
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from continual.errors import RunError


def layer_of(parameter_name: str) -> str:
    """Return the layer that an adapter's parameter belongs to, or "bank" for one that all layers share.

    The layer is the part of the name up to its last index: "model.layers.3" of
    "base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight".
    """
    match = re.match(r"(?:base_model\.)?(?:model\.)?(.*?\d+)(?=\.)(?!.*\.\d+\.)", parameter_name)
    return match.group(1) if match else "bank"


class GradientRecorder(L.Callback):
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
        self.rows: list[dict[str, Any]] = []
        self._pending: list[tuple[int, int, Tensor, Tensor]] = []

    def start(self, keys: dict[str, Any]) -> None:
        """Begin a stage; ``keys`` are the columns run, seed, stage and task."""
        self.keys, self.rows, self._pending = keys, [], []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Group the trainable parameters by layer."""
        named = [(n.removeprefix("model."), p) for n, p in pl_module.named_parameters() if p.requires_grad]
        self._parameters: list[nn.Parameter] = [parameter for _, parameter in named]
        names = [layer_of(name) for name, _ in named]
        self._layers = list(dict.fromkeys(names))
        self._index = torch.tensor([self._layers.index(name) for name in names])
        self._own = torch.tensor([name != "bank" for name in self._layers])

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Keep the norms of this step, on the device."""
        zero = torch.zeros((), device=pl_module.device)
        norms = torch._foreach_norm([zero if p.grad is None else p.grad for p in self._parameters])
        squares = torch.stack([norm.float() for norm in norms]).square()
        index = self._index.to(squares.device)
        self._norms = torch.zeros(len(self._layers), device=squares.device).index_add(0, index, squares).sqrt()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the loss; look at what is kept once in a while."""
        loss = outputs["loss"].detach()
        self._pending.append((trainer.global_step, trainer.current_epoch, loss, self._norms))
        if loss.device.type == "cpu" or len(self._pending) >= 16:
            self._settle()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at what is left."""
        self._settle()

    def _settle(self) -> None:
        for step, epoch, loss, norms in self._pending:
            value, layer_norms = loss.item(), norms.cpu()
            if not torch.isfinite(torch.tensor(value)):
                raise RunError(f"stage {self.keys['task']!r}, step {step}: the loss is {value}; the stage is dropped")
            self._add(step, epoch, "train_loss", "", value, 1, "lower")
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
