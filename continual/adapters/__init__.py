"""Adapters as PEFT methods: the atom bank with its router, its routed rivals, full fine-tuning; others are peft's."""

from continual.adapters.bank_folder import GateInputs, load_bank
from continual.adapters.comol import CoMoLConfig
from continual.adapters.config import QueryableLoraConfig
from continual.adapters.full import FullFineTuningConfig, FullFineTuningModel
from continual.adapters.moe_lora import MoeLoraConfig
from continual.adapters.queryable import QueryableLoraModel
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
