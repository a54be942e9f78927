"""What strategies that take plain LoRA apart have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn

from continual.compat.peft import lora_pair
from continual.errors import ConfigError

if TYPE_CHECKING:
    from continual.interfaces import AdaptedModule

# Fields of a LoraConfig under which an update is more than (lora_alpha / r) B A of the same rank everywhere.
_PLAIN = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "target_parameters", "lora_bias")


def check_plain_lora(module: AdaptedModule, method: str) -> None:
    """Raise ConfigError for any adapter but plain LoRA on linear layers."""
    config = module.adapter
    if type(config) is not LoraConfig:
        raise ConfigError(f"model.strategy: {method} needs the adapter peft.LoraConfig, not {type(config).__name__}")
    if odd := [name for name in _PLAIN if getattr(config, name, None)] + ["bias"] * (config.bias != "none"):
        raise ConfigError(f"model.strategy: {method} needs plain LoRA: leave {', '.join(odd)} of model.adapter out")
    if config.init_lora_weights is not True:
        raise ConfigError(f"model.strategy: {method} needs updates that start at 0: leave init_lora_weights out")
    for part in module.modules():
        if isinstance(part, lora.LoraLayer) and not _is_linear(part):
            raise ConfigError(
                f"model.strategy: {method} adapts linear layers alone, not {type(part.base_layer).__name__}"
            )


def lora_layers(module: AdaptedModule) -> dict[str, Any]:
    """Return the adapted layers by name, in the order that the model registers them."""
    return {name: part for name, part in module.named_modules() if _is_linear(part)}


def lora_weights(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """Return an adapter's A, (r, d_in), and B, (d_out, r), in an adapted layer."""
    A, B = lora_pair(layer, name)
    return A.weight, B.weight


def _is_linear(part: nn.Module) -> bool:
    # Over quantised weights PEFT has classes of its own, with the same pairs.
    return isinstance(part, lora.Linear) or (
        isinstance(part, lora.LoraLayer) and isinstance(part.get_base_layer(), nn.Linear)
    )
