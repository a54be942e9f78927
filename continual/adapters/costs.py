"""Parameters and FLOPs of an adapter's parts, and plain LoRA's row beside them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from continual.adapters.routed_linear import RoutedLinear


def with_lora(table: dict[str, dict[str, int]], rank: int, layers: Sequence[RoutedLinear]) -> dict[str, dict[str, int]]:
    """Add the table's total and plain LoRA's row."""
    weights = rank * sum(widths(layers))
    table["total"] = {key: sum(entry[key] for entry in table.values()) for key in table["A"]}
    return table | {"lora": entry(weights, 2 * weights)}


def widths(layers: Sequence[RoutedLinear]) -> tuple[int, int]:
    return sum(layer.in_features for layer in layers), sum(layer.out_features for layer in layers)


def count(*tensors: Tensor) -> int:
    return sum(tensor.numel() for tensor in tensors if tensor.requires_grad)


def entry(parameters: int, flops_per_token: int, flops_per_row: int = 0) -> dict[str, int]:
    return {"parameters": parameters, "flops_per_token": flops_per_token, "flops_per_row": flops_per_row}
