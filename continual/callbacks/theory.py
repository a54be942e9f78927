"""During training: how near the theory's bounds come to being reached, measured on the batches of a real run.

Queryable LoRA, arXiv 2605.08423. Every ratio is what was observed / what bounds it, so that none may exceed 1:

    weights   sum_m |alpha_m| / 1                                   S_b lies in the atoms' convex hull
    operator  ||S_b|| / max_m ||C_m||                               Theorem D.8
    update    ||y - W h|| / ((lora_alpha / r) ||B|| R_C ||A|| ||h||)   Corollary D.8.1, R_C = max_m ||C_m||
    summary   ||s_b|| / max_{j<b} ||z_j||                           the depth summary

Matrix norms are spectral. Shapes as in ``adapters.router``; n tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.linalg import matrix_norm, vector_norm

from continual.adapters.queryable.layer import QueryableLinear
from continual.adapters.queryable.router import routed_operator
from continual.interfaces import Recorder, Rows, StageContext
from continual.runtime import distributed
from continual.runtime.parameters import evaluating, forward_context

RATIOS = ("weights", "operator", "update", "summary")
_MOST_OPERATORS = 1024  # a singular value decomposition each


class TheoryRecorder(Recorder):
    """Rows for the table ``theory``: the largest ratio of each bound in each block, over a batch's tokens.

    The batch of a step is passed through the model once more, without gradients and dropout, so that training goes on
    as it would have. Adapters without a bank leave no rows.

    Args:
        interval: Steps between two measurements; the first step is always measured.
    """

    def __init__(self, interval: int = 20) -> None:
        self.interval = interval
        self.rows: Rows = []

    def begin(self, context: StageContext) -> None:
        """Begin a stage."""
        self.keys, self.rows = context.keys, []

    def tables(self) -> dict[str, Rows]:
        """Return the rows of the table ``theory``."""
        return {"theory": self.rows}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure, once in a while."""
        step = trainer.global_step
        if step != 1 and step % self.interval:
            return
        everywhere = distributed.gathered(measure(pl_module, batch) if batch["weight"] else {})
        for metric, block in everywhere[0]:
            ratios, counts = zip(*(found[metric, block] for found in everywhere if found), strict=True)
            value, count = max(ratios), sum(counts)
            place = {"step": step, "epoch": trainer.current_epoch, "block": block}
            measured = {"metric": metric, "direction": "none", "value": value, "count": count}
            self.rows.append(self.keys | place | measured)


def measure(module: Any, batch: dict[str, Any]) -> dict[tuple[str, int], tuple[float, int]]:
    """Return the largest ratio of each bound on one batch, and over how many tokens, by metric and block."""
    found: dict[tuple[str, int], tuple[float, int]] = {}

    def watch(layer: QueryableLinear, args: tuple[Tensor, ...], output: Tensor) -> None:
        with torch.autocast(output.device.type, enabled=False):
            for key, ratio in _ratios(layer, args[0]):
                largest, count = found.get(key, (0.0, 0))
                found[key] = (max(largest, ratio.max().item()), count + ratio.numel())

    layers = [layer for layer in module.modules() if isinstance(layer, QueryableLinear)]
    handles = [layer.register_forward_hook(watch) for layer in layers]
    try:
        if layers:
            with torch.no_grad(), evaluating(module), forward_context(module):
                module.outputs(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _ratios(layer: QueryableLinear, h: Tensor) -> Iterator[tuple[tuple[str, int], Tensor]]:
    """Yield each metric, block and ratios, (n), of every adapter that the pass under way uses in a layer."""
    for use in layer.routing_state or []:
        bank, part, block = use.bank, use.block, layer.blocks[use.name]
        alpha, z = part.route, part.state
        assert alpha is not None and z is not None  # the layer's own pass has routed
        atoms = bank.atoms.float()
        radius = matrix_norm(atoms, ord=2).max()
        if use.leads:
            routes = alpha.float().flatten(0, -2)
            yield ("weights", block), routes.abs().sum(dim=-1)
            operators = routed_operator(routes[:: 1 + len(routes) // _MOST_OPERATORS], atoms)
            yield ("operator", block), matrix_norm(operators, ord=2) / radius
            if part.earlier is not None:
                summary = vector_norm(bank.depth_summary(part, z), dim=-1)
                yield ("summary", block), _ratio(summary, vector_norm(part.earlier, dim=-1).amax(dim=-1))
        x = h.to(use.weight_A.dtype)
        routed = bank.apply_route(part, F.linear(x, use.weight_A).unsqueeze(-2)).squeeze(-2)
        update = F.linear(routed, use.weight_B)
        norms = matrix_norm(use.weight_A.float(), ord=2) * matrix_norm(use.weight_B.float(), ord=2)
        bound = layer.scaling[use.name] * radius * norms * vector_norm(x, dim=-1)
        yield ("update", block), _ratio(vector_norm(update, dim=-1), bound)


def _ratio(observed: Tensor, bound: Tensor) -> Tensor:
    """Return observed / bound, (n); 0 / 0 is 0."""
    observed, bound = observed.float().flatten(), bound.float().flatten()
    return torch.where(observed > 0, observed / bound, 0.0)
