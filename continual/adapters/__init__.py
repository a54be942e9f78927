"""Adapters: the atom bank with its router, and its routed rivals, as PEFT methods. All others come from peft itself."""

from continual.adapters.bank_folder import GateInputs, load_bank
from continual.adapters.comol import CoMoLConfig
from continual.adapters.config import QueryableLoraConfig
from continual.adapters.moe_lora import MoeLoraConfig
from continual.adapters.queryable import QueryableLoraModel
from continual.adapters.tuner import RoutedTuner

__all__ = [
    "CoMoLConfig",
    "GateInputs",
    "MoeLoraConfig",
    "QueryableLoraConfig",
    "QueryableLoraModel",
    "RoutedTuner",
    "load_bank",
]
