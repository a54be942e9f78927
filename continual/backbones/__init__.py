"""Backbones: causal language models read by transformers, and an MLP regressor."""

from continual.backbones.base import Backbone
from continual.backbones.causal_lm import CausalLM
from continual.backbones.regressor import MLPRegressor
from continual.backbones.sentence_encoder import SentenceEncoder
from continual.backbones.tiny import TinyCausalLM

__all__ = ["Backbone", "CausalLM", "MLPRegressor", "SentenceEncoder", "TinyCausalLM"]
