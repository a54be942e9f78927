"""What every backbone offers: a name for reports, a kind, and a module with its pretrained weights."""

import abc
from typing import ClassVar, Literal

from torch import nn


class Backbone(abc.ABC):
    """A frozen model that an adapter is trained on.

    Constructors only keep their arguments, so that jsonargparse can build a backbone from YAML and a configuration
    can be checked without loading anything; `build` does the reading.
    """

    kind: ClassVar[Literal["causal_lm", "regressor"]]
    """Which losses, batches and scores fit this backbone."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The model's name in reports, such as `SmolLM2-135M-Instruct`."""

    @abc.abstractmethod
    def build(self) -> nn.Module:
        """Loads the weights.

        Returns:
            The module in evaluation mode. Freezing is left to PEFT, which does it when an adapter goes in.

        Raises:
            ConfigError: the model cannot be found or read.
        """
