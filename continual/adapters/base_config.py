"""What the configurations of all our adapters share: LoRA's own fields, and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field

from peft.config import PeftConfig


@dataclass
class RoutedLoraConfig(PeftConfig):
    """The fields that every routed LoRA has: PEFT's names and meanings.

    Raises:
        ValueError: A field out of range, or two that contradict each other; the message names them.
    """

    r: int = field(default=8, metadata={"help": "Rank of the update: of A, B and what stands between them."})
    lora_alpha: float = field(default=16, metadata={"help": "The update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapted layer's input."})
    target_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module name suffixes, or one regular expression. Every entry has to match."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module name suffixes, or one regular expression, that are left alone."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained whole and saved beside the adapter."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt; all when not given."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the layer list that layers_to_transform indexes, if it is unusual."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                setattr(self, name, sorted(value))  # a set's order follows PYTHONHASHSEED; saved files must not
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules as a list: PEFT ignores it beside an expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says nothing without layers_to_transform")
        self._check_at_least_one("r")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}")

    def _check_at_least_one(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
