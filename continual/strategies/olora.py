"""O-LoRA: each stage learns in low-rank subspaces of its own, orthogonal to those of the stages before.

Wang et al. 2023, 'Orthogonal Subspace Learning for Language Model Continual Learning', arXiv 2310.14152, section 3.2:

    W_t = W_0 + (lora_alpha / r) sum_{i <= t} B_i A_i,   loss + weight sum_{i < t} || A_i A_t^T ||_F^2

A_i, B_i of earlier stages are frozen. (In PEFT's notation; the paper's A and B are transposed. The authors' code sums
absolute values instead of squares and takes 0.5 for the weight.)

Between stages all pairs lie in ONE LoRA of rank r t: A stacks the A_i, B puts the B_i side by side, and lora_alpha / r
stays as it was. Its folder is an ordinary PEFT folder that PEFT loads by itself.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor

from continual.compat.peft import has_lora_pair, lora_pair, resize_lora
from continual.strategies.base import Strategy, require_at_least
from continual.strategies.plain_lora import check_plain_lora, lora_layers, lora_weights

if TYPE_CHECKING:
    from continual.data.stage_data import StageData
    from continual.interfaces import AdaptedModule

ALL, NEW = "default", "new"  # adapters: all earlier pairs, and the one being trained


class OLoRA(Strategy):
    """Freezes earlier low-rank pairs and keeps the new one orthogonal to them (see the module's docstring).

    The paper's second term, an L2 penalty on the new pair, is the optimizer's weight decay here.

    Stores: every stage's pairs, 4 r (d_in + d_out) bytes a stage and adapted projection; they serve the model too.

    Args:
        weight: Weight of the orthogonality penalty, at least 0.
    """

    method = "OLoRA"

    def __init__(self, weight: float = 0.5) -> None:
        require_at_least(0, weight=weight)
        self.weight = weight
        self.num_pairs = 1
        self._pair_bytes = 0

    def check(self, module: AdaptedModule, stages: Sequence[StageData]) -> None:
        """Raise ConfigError for any adapter but plain LoRA on linear layers."""
        check_plain_lora(module, self.method)

    def begin_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Freeze the pairs so far and add a new one; the first stage trains the adapter's own."""
        if stage == 1:
            return
        model: PeftModel = module.model  # type: ignore[assignment]
        config = copy.deepcopy(model.peft_config[ALL])
        config.r, config.lora_alpha = module.adapter.r, module.adapter.lora_alpha  # type: ignore[attr-defined]
        model.add_adapter(NEW, config)
        model.base_model.set_adapter([ALL, NEW])  # type: ignore[operator]
        for layer in layers(module):
            for part in lora_pair(layer, ALL):
                part.requires_grad_(False)

    def penalty(self, module: AdaptedModule, batch: dict[str, Any], outputs: Tensor) -> Tensor | None:
        """Return the squared overlap of the new pairs' inputs with all earlier ones."""
        overlaps = [o.square().sum() for o in self.overlaps(module)]
        return self.weight * torch.stack(overlaps).sum() if overlaps and self.weight else None

    def overlaps(self, module: AdaptedModule) -> list[Tensor]:
        """Return A_old A_new^T, (r (t - 1), r), of every adapted projection; none outside of stages 2 and later."""
        found = [layer for layer in layers(module) if has_lora_pair(layer, NEW)]
        return [lora_weights(layer, ALL)[0] @ lora_weights(layer, NEW)[0].T for layer in found]

    def end_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Put the new pair with the others, so that what is scored is what is saved."""
        model: PeftModel = module.model  # type: ignore[assignment]
        self.num_pairs = stage
        if stage > 1:
            pairs = [lora_weights(layer, NEW) for layer in layers(module)]
            model.base_model.set_adapter(ALL)  # type: ignore[operator]
            model.delete_adapter(NEW)
            old = [lora_weights(layer, ALL) for layer in layers(module)]
            self._grow(module)
            with torch.no_grad():
                for layer, (old_A, old_B), (new_A, new_B) in zip(layers(module), old, pairs, strict=True):
                    all_A, all_B = lora_weights(layer, ALL)
                    all_A.copy_(torch.cat([old_A, new_A]))
                    all_B.copy_(torch.cat([old_B, new_B], dim=1))
        kept = [weight for layer in layers(module) for weight in lora_weights(layer, ALL)]
        self._pair_bytes = sum(weight.numel() * weight.element_size() for weight in kept)

    def _grow(self, module: AdaptedModule) -> None:
        """Make room for ``num_pairs`` pairs; the weights are whatever they are."""
        model: PeftModel = module.model  # type: ignore[assignment]
        rank, alpha = module.adapter.r, module.adapter.lora_alpha  # type: ignore[attr-defined]
        config: Any = model.peft_config[ALL]
        config.r = rank * self.num_pairs
        factor = math.sqrt(self.num_pairs) if config.use_rslora else self.num_pairs  # lora_alpha / r, or / sqrt(r)
        config.lora_alpha = alpha * factor
        for layer in layers(module):
            resize_lora(layer, ALL, config.r, config.lora_alpha)

    def stored_bytes(self) -> int:
        """Return the bytes of all pairs, in the adapter's folder, and of the note on how many there are."""
        return super().stored_bytes() + self._pair_bytes

    def write(self, folder: Path) -> None:
        """Write how many pairs there are; they themselves lie in the adapter's folder."""
        state = {"num_pairs": self.num_pairs, "pair_bytes": self._pair_bytes}
        (folder / "pairs.json").write_text(json.dumps(state), encoding="utf-8")

    def read(self, module: AdaptedModule, folder: Path) -> None:
        """Make room for the pairs that the adapter's folder holds."""
        state = json.loads((folder / "pairs.json").read_text(encoding="utf-8"))
        self.num_pairs, self._pair_bytes = state["num_pairs"], state["pair_bytes"]
        if self.num_pairs > 1:
            self._grow(module)


def layers(module: AdaptedModule) -> list[Any]:
    """Return the adapted layers."""
    return list(lora_layers(module).values())
