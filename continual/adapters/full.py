"""Full fine-tuning as a PEFT method: chosen modules are trained whole, in copies beside the frozen ones.

A copy rather than the module itself, so that everything that PEFT does with an adapter is there: switching it off gives
the backbone back, its folder holds the trained modules alone, and a backbone in bfloat16 is trained in float32 (the
copies' dtype) while it computes in its own.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.peft_types import PeftType, register_peft_method
from torch import nn
from torch.func import functional_call

from continual.adapters.tuner import LayerTuner
from continual.compat.peft import extend_peft_types

PEFT_NAME = "FULL"
extend_peft_types(PEFT_NAME)


@dataclass
class FullFineTuningConfig(PeftConfig):
    """Trains whole modules (see the module's docstring)."""

    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules to train whole, by name, suffix or regular expression. When not given: every module with "
            "weights of its own, except embeddings and the head of a language model."
        },
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules not to train."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Indices of layers to train."})
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list that layers_to_transform indexes, if it is unusual."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[PEFT_NAME]
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                setattr(self, name, sorted(value))  # a set's order follows PYTHONHASHSEED; saved files must not


class FullLayer(nn.Module, BaseTunerLayer):
    """A frozen module and, for each adapter, a trained copy that computes in its place."""

    adapter_layer_names = ("full_copy",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.full_copy = nn.ModuleDict()
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, config: FullFineTuningConfig) -> None:
        """Add the adapter ``adapter_name``: a copy of the module as it is."""
        self.full_copy[adapter_name] = copy.deepcopy(self.base_layer)
        self.set_adapter(self.active_adapters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the active copy computes, in the backbone's dtype; the frozen module without one."""
        active = [name for name in self.active_adapters if name in self.full_copy]
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(*args, **kwargs)
        if len(active) > 1:
            raise ValueError(f"full fine-tuning takes one active adapter at a time, got {', '.join(active)}")
        trained = self.full_copy[active[0]]
        dtypes = {name: parameter.dtype for name, parameter in self.base_layer.named_parameters()}
        weights = {name: weight.to(dtypes[name]) for name, weight in trained.named_parameters()}
        return functional_call(trained, weights, args, kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the copy's weights into the module; the module's own wait in the copy."""
        for name in check_adapters_to_merge(self, adapter_names):
            self._swap(name)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the module's own weights back."""
        while self.merged_adapters:
            self._swap(self.merged_adapters.pop())

    @torch.no_grad()
    def _swap(self, name: str) -> None:
        for own, trained in zip(self.base_layer.parameters(), self.full_copy[name].parameters(), strict=True):
            before = own.clone()
            own.copy_(trained)
            trained.copy_(before)


class FullFineTuningModel(LayerTuner):
    """The tuner behind ``get_peft_model(model, FullFineTuningConfig(...))``."""

    prefix = "full_"
    tuner_layer_cls = FullLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put the copies of ``adapter_name`` in. PEFT calls this for every adapter.

        Raises:
            ValueError: A target module shares its weights with another one.
        """
        config = cast(FullFineTuningConfig, self.peft_config[adapter_name])
        if config.target_modules is None:
            config.target_modules = trainable_modules(model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _layer_around(self, target: nn.Module, place: str) -> FullLayer:
        uses = Counter(id(p) for _, p in self.model.named_parameters(remove_duplicate=False))
        if any(uses[id(parameter)] > 1 for parameter in target.parameters()):
            raise ValueError(f"{place} shares its weights with another module, so that it cannot train alone")
        return FullLayer(target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        if autocast_adapter_dtype:
            for module in self.model.modules():
                if isinstance(module, FullLayer) and adapter_name in module.full_copy:
                    module.full_copy[adapter_name].float()


def trainable_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules with weights of their own, embeddings and a language model's head left out."""
    find_head = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    names = []
    for name, module in model.named_modules():
        if isinstance(module, FullLayer):
            names.append(name)
        inside = ".base_layer" in name or ".full_copy" in name
        if not inside and name and module is not head and not isinstance(module, nn.Embedding):
            names += [name] if list(module.parameters(recurse=False)) else []
    return sorted(names)


register_peft_method(name=PEFT_NAME.lower(), config_cls=FullFineTuningConfig, model_cls=FullFineTuningModel)
