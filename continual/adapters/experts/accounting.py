"""What a mixture of experts costs: trainable parameters and FLOPs by component, beside plain LoRA's."""

from __future__ import annotations

from collections.abc import Sequence

from continual.adapters.costs import count, entry, with_lora
from continual.adapters.routed_linear import RoutedLinear


def account_experts(layers: Sequence[RoutedLinear], adapter_name: str) -> dict[str, dict[str, int]]:
    """Count the parameters and FLOPs of one mixture of experts; see ``ExpertTuner.accounting``."""
    table = {}
    for name in layers[0].adapter_layer_names:
        tensors = [getattr(layer, name)[adapter_name] for layer in layers]
        # Every number of every tensor is multiplied with something once a token.
        table[name.removeprefix("expert_")] = entry(count(*tensors), 2 * sum(t.numel() for t in tensors))
    return with_lora(table, layers[0].r[adapter_name], layers)
