"""What an adapter costs: trainable parameters and FLOPs by component, beside plain LoRA's."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from continual.adapters.experts import ExpertLinear
from continual.adapters.layer import QueryableLinear
from continual.adapters.routed_linear import RoutedLinear
from continual.adapters.router import AtomBank


def account(bank: AtomBank, layers: Sequence[QueryableLinear], adapter_name: str) -> dict[str, dict[str, int]]:
    """Count one adapter's parameters and FLOPs; see ``QueryableLoraModel.accounting``."""
    config, rank, num_atoms = bank.config, bank.config.r, bank.config.num_atoms
    d_in, d_out = _widths(layers)
    table = {
        "A": _entry(_count(*(layer.queryable_A[adapter_name] for layer in layers)), 2 * rank * d_in),
        "B": _entry(_count(*(layer.queryable_B[adapter_name] for layer in layers)), 2 * rank * d_out),
        "bank": _entry(_count(bank.atoms), 2 * rank * rank * (num_atoms * config.num_blocks + len(layers))),
        "keys": _entry(0, 0),
        "query_maps": _entry(0, 0),
        "prior": _entry(0, 0),
    }
    if config.uses_state:
        table["keys"] = _entry(_count(bank.keys), 2 * bank.keys.numel() * config.num_blocks)
        queries, flops = [bank.query_maps], 2 * bank.query_maps.numel()
        if config.uses_summary:
            queries.append(bank.summary_queries)
            flops += sum(2 * block * rank for block in range(1, config.num_blocks))  # scores
        table["query_maps"] = _entry(_count(*queries), flops)
    elif config.uses_keys:  # the instruction asks, once a row
        table["keys"] = _entry(_count(bank.keys), 0, 2 * bank.keys.numel() * config.num_blocks)
        table["query_maps"] = _entry(_count(bank.query_maps), 0, 2 * bank.query_maps.numel())
    if config.uses_prior:
        prior_flops = 2 * (bank.prior_map.numel() + bank.prior_keys.numel())
        table["prior"] = _entry(_count(bank.prior_map, bank.prior_keys), 0, prior_flops)
    return _with_lora(table, rank, layers)


def account_experts(layers: Sequence[ExpertLinear], adapter_name: str) -> dict[str, dict[str, int]]:
    """Count the parameters and FLOPs of one mixture of experts; see ``ExpertTuner.accounting``."""
    table = {}
    for name in layers[0].adapter_layer_names:
        tensors = [getattr(layer, name)[adapter_name] for layer in layers]
        # Every number of every tensor is multiplied with something once a token.
        table[name.removeprefix("expert_")] = _entry(_count(*tensors), 2 * sum(t.numel() for t in tensors))
    return _with_lora(table, layers[0].r[adapter_name], layers)


def _with_lora(
    table: dict[str, dict[str, int]], rank: int, layers: Sequence[RoutedLinear]
) -> dict[str, dict[str, int]]:
    """Add the table's total and plain LoRA's row."""
    weights = rank * sum(_widths(layers))
    table["total"] = {key: sum(entry[key] for entry in table.values()) for key in table["A"]}
    return table | {"lora": _entry(weights, 2 * weights)}


def _widths(layers: Sequence[RoutedLinear]) -> tuple[int, int]:
    return sum(layer.in_features for layer in layers), sum(layer.out_features for layer in layers)


def _count(*tensors: Tensor) -> int:
    return sum(tensor.numel() for tensor in tensors if tensor.requires_grad)


def _entry(parameters: int, flops_per_token: int, flops_per_row: int = 0) -> dict[str, int]:
    return {"parameters": parameters, "flops_per_token": flops_per_token, "flops_per_row": flops_per_row}
