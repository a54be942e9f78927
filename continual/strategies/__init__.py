"""Strategies against forgetting, one class each; a configuration names one under ``model.strategy``."""

from continual.strategies.agem import AGEM
from continual.strategies.base import Sequential, Strategy
from continual.strategies.clora import CLoRA
from continual.strategies.ewc import EWC, OnlineEWC
from continual.strategies.growing_bank import GrowingBank
from continual.strategies.joint import Joint
from continual.strategies.library import PerInstructionLookup, PerTask
from continual.strategies.lwf import LwF
from continual.strategies.nlora import NLoRA
from continual.strategies.olora import OLoRA
from continual.strategies.replay import DERPlusPlus, ExperienceReplay
from continual.strategies.reuse import ReuseBank
from continual.strategies.seqr import SEQR

__all__ = [
    "AGEM",
    "EWC",
    "SEQR",
    "CLoRA",
    "DERPlusPlus",
    "ExperienceReplay",
    "GrowingBank",
    "Joint",
    "LwF",
    "NLoRA",
    "OLoRA",
    "OnlineEWC",
    "PerInstructionLookup",
    "PerTask",
    "ReuseBank",
    "Sequential",
    "Strategy",
]
