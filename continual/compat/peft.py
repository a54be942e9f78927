"""What we lean on inside PEFT (read in 0.21.2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from continual.compat.stand_in import stands_in_for

_READ_IN = "0.21.2"
_TUNER = "peft.tuners.tuners_utils.BaseTuner"
_LAYER = "peft.tuners.tuners_utils.BaseTunerLayer"
_LORA = "peft.tuners.lora.LoraLayer"
_ADALORA = "peft.tuners.adalora"

# -- PEFT's list of methods -------------------------------------------------------------------------------------------


@stands_in_for(
    "peft.utils.peft_types.PeftType._member_names_",
    "peft.utils.peft_types.PeftType._member_map_",
    "peft.utils.peft_types.PeftType._value2member_map_",
    read_in=_READ_IN,
)
def extend_peft_types(name: str) -> None:
    """Add a method to PEFT's closed enum of methods; plain strings break its mixed models and native integration."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)  # Python 3.12 looks members up as plain attributes


# -- tuners and their layers ------------------------------------------------------------------------------------------


@stands_in_for(f"{_TUNER}._replace_module(self, parent, child_name, new_module, child)", read_in=_READ_IN)
def replace_module(tuner: BaseTuner, parent: nn.Module, name: str, layer: nn.Module, target: nn.Module) -> None:
    """Put a tuner's layer in the place of ``target``, on its device."""
    tuner._replace_module(parent, name, layer, target)


@stands_in_for(f"{_TUNER}._check_target_module_exists(peft_config, key)", read_in=_READ_IN)
def is_target(tuner: BaseTuner, config: PeftConfig, place: str) -> bool:
    """Say whether a configuration targets the module that the model calls ``place``."""
    return bool(tuner._check_target_module_exists(config, place))


@stands_in_for(f"{_LAYER}._active_adapter", read_in=_READ_IN)
def set_active(layer: BaseTunerLayer, names: list[str]) -> None:
    """Name a new layer's active adapters before it has them; ``set_adapter`` would look for their tensors."""
    layer._active_adapter = names


@stands_in_for(f"{_LAYER}._move_adapter_to_device_of_base_layer(self, adapter_name, device=None)", read_in=_READ_IN)
def move_to_base_layer(layer: BaseTunerLayer, name: str) -> None:
    """Move an adapter's tensors to where the frozen layer's lie, in its dtype where that is a floating one."""
    layer._move_adapter_to_device_of_base_layer(name)


@stands_in_for(f"{_LAYER}._cast_input_dtype(self, x, dtype)", read_in=_READ_IN)
def cast_input(layer: BaseTunerLayer, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an adapted layer's input in its adapter's dtype, unless casting is switched off."""
    return layer._cast_input_dtype(x, dtype)


# -- LoRA -------------------------------------------------------------------------------------------------------------


@stands_in_for(f"{_LORA}.lora_A", f"{_LORA}.lora_B", read_in=_READ_IN)
def lora_pair(layer: Any, name: str) -> tuple[Any, Any]:
    """Return the linear layers of an adapter's A, whose weight is (r, d_in), and of its B, (d_out, r)."""
    return layer.lora_A[name], layer.lora_B[name]


@stands_in_for(f"{_LORA}.lora_A", read_in=_READ_IN)
def has_lora_pair(layer: Any, name: str) -> bool:
    """Say whether a LoRA layer has the adapter ``name``."""
    return name in layer.lora_A


@stands_in_for(
    *(f"{_LORA}.{name}" for name in ("lora_A", "lora_B", "r", "lora_alpha", "in_features", "out_features")),
    read_in=_READ_IN,
)
def resize_lora(layer: Any, name: str, rank: int, alpha: float) -> None:
    """Make room for another rank in a LoRA layer; the weights are whatever they are, the scaling stays as it was."""
    like = layer.lora_A[name].weight
    place = {"bias": False, "device": like.device, "dtype": like.dtype}
    layer.lora_A[name] = nn.Linear(layer.in_features, rank, **place)
    layer.lora_B[name] = nn.Linear(rank, layer.out_features, **place)
    layer.r[name], layer.lora_alpha[name] = rank, alpha


# -- AdaLoRA ----------------------------------------------------------------------------------------------------------


@stands_in_for(f"{_ADALORA}.AdaLoraModel.trainable_adapter_name", read_in=_READ_IN)
def adalora_adapter(tuner: AdaLoraModel) -> str:
    """Return the name of the one adapter that an AdaLoRA tuner trains."""
    return tuner.trainable_adapter_name


@stands_in_for(f"{_ADALORA}.AdaLoraModel.rankallocator", f"{_ADALORA}.RankAllocator.reset_ipt(self)", read_in=_READ_IN)
def forget_importance(tuner: AdaLoraModel) -> None:
    """Forget what AdaLoRA's allocator has noted of the directions' importance."""
    tuner.rankallocator.reset_ipt()


@stands_in_for(
    f"{_ADALORA}.AdaLoraModel.rankallocator",
    f"{_ADALORA}.RankAllocator.target_bgt",
    f"{_ADALORA}.RankAllocator.init_bgt",
    read_in=_READ_IN,
)
def has_ranks_to_drop(tuner: AdaLoraModel) -> bool:
    """Say whether AdaLoRA's budget falls at all."""
    return tuner.rankallocator.target_bgt < tuner.rankallocator.init_bgt


@stands_in_for(f"{_ADALORA}.AdaLoraLayer.lora_A", f"{_ADALORA}.AdaLoraLayer.lora_B", read_in=_READ_IN)
def adalora_directions(tuner: AdaLoraModel) -> Iterator[Tensor]:
    """Yield every A, (r, d_in), and every B transposed, (r, d_out), of the adapter that an AdaLoRA tuner trains."""
    name = adalora_adapter(tuner)
    for path, weight in tuner.model.named_parameters():
        if path.endswith((f"lora_A.{name}", f"lora_B.{name}")):
            yield weight if path.endswith(f"lora_A.{name}") else weight.T
