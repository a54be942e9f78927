"""Adapters: the atom bank with its router, as a PEFT method. Every other adapter comes from peft by class path."""

from continual.adapters.config import QueryableLoraConfig
from continual.adapters.queryable import QueryableLoraModel

__all__ = ["QueryableLoraConfig", "QueryableLoraModel"]
