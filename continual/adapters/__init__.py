"""Adapters as PEFT methods: the atom bank with its router, its routed rivals, full fine-tuning; others are peft's."""

from continual.adapters.config import QueryableLoraConfig
from continual.adapters.experts.comol import CoMoLConfig
from continual.adapters.experts.moe_lora import MoeLoraConfig
from continual.adapters.full import FullFineTuningConfig, FullFineTuningModel
from continual.adapters.growing.bank_folder import GateInputs, load_bank
from continual.adapters.queryable.model import QueryableLoraModel
from continual.adapters.tuner import RoutedTuner

__all__ = [
    "CoMoLConfig",
    "FullFineTuningConfig",
    "FullFineTuningModel",
    "GateInputs",
    "MoeLoraConfig",
    "QueryableLoraConfig",
    "QueryableLoraModel",
    "RoutedTuner",
    "load_bank",
]
