"""What an adapter costs: trainable parameters and FLOPs by component, beside plain LoRA's."""

from __future__ import annotations

from collections.abc import Sequence

from continual.adapters.costs import count, entry, widths, with_lora
from continual.adapters.queryable.layer import QueryableLinear
from continual.adapters.queryable.router import AtomBank


def account(bank: AtomBank, layers: Sequence[QueryableLinear], adapter_name: str) -> dict[str, dict[str, int]]:
    """Count one adapter's parameters and FLOPs; see ``QueryableLoraModel.accounting``."""
    config, rank, num_atoms = bank.config, bank.config.r, bank.config.num_atoms
    d_in, d_out = widths(layers)
    table = {
        "A": entry(count(*(layer.queryable_A[adapter_name] for layer in layers)), 2 * rank * d_in),
        "B": entry(count(*(layer.queryable_B[adapter_name] for layer in layers)), 2 * rank * d_out),
        "bank": entry(count(bank.atoms), 2 * rank * rank * (num_atoms * config.num_blocks + len(layers))),
        "keys": entry(0, 0),
        "query_maps": entry(0, 0),
        "prior": entry(0, 0),
    }
    if config.uses_state:
        table["keys"] = entry(count(bank.keys), 2 * bank.keys.numel() * config.num_blocks)
        queries, flops = [bank.query_maps], 2 * bank.query_maps.numel()
        if config.uses_summary:
            queries.append(bank.summary_queries)
            flops += sum(2 * block * rank for block in range(1, config.num_blocks))  # scores
        table["query_maps"] = entry(count(*queries), flops)
    elif config.uses_keys:  # the instruction asks, once a row
        table["keys"] = entry(count(bank.keys), 0, 2 * bank.keys.numel() * config.num_blocks)
        table["query_maps"] = entry(count(bank.query_maps), 0, 2 * bank.query_maps.numel())
    if config.uses_prior:
        prior_flops = 2 * (bank.prior_map.numel() + bank.prior_keys.numel())
        table["prior"] = entry(count(bank.prior_map, bank.prior_keys), 0, prior_flops)
    return with_lora(table, rank, layers)
