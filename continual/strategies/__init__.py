"""Strategies against forgetting, one class each; a configuration names one under ``model.strategy``."""

from continual.strategies.base import Sequential, Strategy

__all__ = ["Sequential", "Strategy"]
