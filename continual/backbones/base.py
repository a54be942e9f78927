"""What every backbone offers: a name for reports, a kind, and a module with its pretrained weights."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel


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


def decoder_of(model: PeftModel) -> Any:
    """Return the decoder of an adapted language model, without its head; None of any other model."""
    return getattr(model.get_base_model(), "get_decoder", lambda: None)()
