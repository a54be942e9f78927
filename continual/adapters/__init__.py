"""Adapters: the atom bank with its router, and full fine-tuning, as PEFT methods; all others come from peft itself."""

from continual.adapters.config import QueryableLoraConfig
from continual.adapters.full import FullFineTuningConfig, FullFineTuningModel
from continual.adapters.queryable import QueryableLoraModel

__all__ = ["FullFineTuningConfig", "FullFineTuningModel", "QueryableLoraConfig", "QueryableLoraModel"]
