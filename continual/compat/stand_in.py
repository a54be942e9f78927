"""The note on each function of this room: which names of another library it stands in for, and their version."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class StandIn:
    """What a function stands in for.

    Attributes:
        names: Dotted paths of the library's names; of what is called, with the parameters that were read.
        read_in: The library's version in which they were read.
    """

    names: tuple[str, ...]
    read_in: str

    @property
    def library(self) -> str:
        """The library's name."""
        return self.names[0].partition(".")[0]


def stands_in_for(*names: str, read_in: str) -> Callable[[_Function], _Function]:
    """Note on a function what it stands in for; the function itself stays as it is.

    Args:
        names: Dotted paths, such as ``peft.utils.peft_types.PeftType``; of what is called or replaced, with its
            parameters: ``peft.tuners.tuners_utils.BaseTunerLayer.set_adapter(self, adapter_names)``. A library's name
            alone stands for the wording of its messages.
        read_in: The library's version.
    """

    def note(function: _Function) -> _Function:
        cast(Any, function).stand_in = StandIn(names, read_in)
        return function

    return note
