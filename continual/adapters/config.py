"""The configuration of the Instruction-Queryable adapter: PEFT's field names where PEFT has one, ours for the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from peft.config import PeftConfig
from peft.utils.peft_types import PeftType

PEFT_NAME = "QUERYABLE"
QuerySource = Literal["state", "frozen_random", "instruction_only", "uniform"]
AtomStart = Literal["orthogonal", "noise", "identity"]


def extend_peft_types(name: str) -> None:
    """Add a method to PEFT's closed enum of methods; plain strings break its mixed models and native integration."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_, member._value_ = name, name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)  # Python 3.12 looks members up as plain attributes


extend_peft_types(PEFT_NAME)


@dataclass
class QueryableLoraConfig(PeftConfig):
    """Configuration of Queryable LoRA (arXiv 2605.08423): LoRA whose middle is mixed from a bank of shared atoms.

    With ``prior_weight`` 0 this is the paper's Queryable LoRA, above 0 its Instruction-Queryable LoRA. Symbols of the
    paper: r = r, num_atoms = M, top_k = k, num_blocks = N, prior_weight = lambda, prior_temperature = tau.

    Choices where the paper leaves room, each a field here: the low-rank state is the activation A_l h_l; a block's
    state is taken for each token from the block's first adapted projection (so routing is causal, a row never depends
    on its neighbours, and a key/value cache stays valid); instructions are encoded by the mean of the frozen
    backbone's input embeddings less a fixed reference, scaled to unit length; atoms start spread (``init_atoms``).

    Raises:
        ValueError: Fields that contradict each other; the message names them.
    """

    r: int = field(default=8, metadata={"help": "Rank of A_l, B_l and the atoms."})
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
    num_atoms: int = field(default=16, metadata={"help": "Atoms in the bank."})
    top_k: int = field(default=4, metadata={"help": "Atoms that a token may use; num_atoms means all."})
    num_blocks: int = field(default=6, metadata={"help": "Blocks of consecutive layers; each routes once a token."})
    key_dim: int | None = field(default=None, metadata={"help": "Width of keys and queries; 2 r when not given."})
    prior_weight: float = field(default=1.0, metadata={"help": "Weight of the instruction prior's log; 0: off."})
    prior_temperature: float = field(default=1.0, metadata={"help": "Temperature of the prior's softmax."})
    prior_dim: int = field(default=16, metadata={"help": "Width that encodings and prior keys are compared in."})
    instruction_dim: int | None = field(
        default=None, metadata={"help": "Width of instruction encodings; the backbone's embedding width if not given."}
    )
    query_source: QuerySource = field(
        default="state",
        metadata={
            "help": "What asks the bank: the state through trained maps, the state through frozen random maps, the "
            "instruction alone, or nothing (all atoms alike)."
        },
    )
    detach_query: bool = field(default=False, metadata={"help": "No gradient from the routes into A_l."})
    use_depth_summary: bool = field(default=True, metadata={"help": "Let the query see the earlier blocks' states."})
    init_atoms: AtomStart = field(
        default="orthogonal",
        metadata={"help": "Start: (1 - s) I + s Q with random rotations Q, I + s noise, or I; s is init_atoms_scale."},
    )
    init_atoms_scale: float = field(default=1.0, metadata={"help": "How far the atoms start from the identity."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[PEFT_NAME]
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                setattr(self, name, sorted(value))  # a set's order follows PYTHONHASHSEED; saved files must not
        for name, choices in (("query_source", get_args(QuerySource)), ("init_atoms", get_args(AtomStart))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs target_modules as a list: PEFT ignores it beside an expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says nothing without layers_to_transform")
        for name in ("r", "num_atoms", "top_k", "num_blocks", "prior_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.top_k > self.num_atoms:
            raise ValueError(f"top_k ({self.top_k}) is larger than num_atoms ({self.num_atoms})")
        if self.key_dim is not None and self.key_dim < 1:
            raise ValueError(f"key_dim must be at least 1, got {self.key_dim}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}")
        if self.prior_weight < 0:
            raise ValueError(f"prior_weight must not be negative, got {self.prior_weight}")
        if self.prior_temperature <= 0:
            raise ValueError(f"prior_temperature must be positive, got {self.prior_temperature}")
        if self.query_source == "instruction_only" and self.prior_weight == 0:
            raise ValueError("query_source 'instruction_only' needs prior_weight above 0: nothing else routes")

    @property
    def uses_prior(self) -> bool:
        """Whether the instruction prior takes part in the routing (and has parameters)."""
        return self.prior_weight > 0 and self.query_source != "uniform"

    @property
    def uses_state(self) -> bool:
        """Whether the token's state takes part in the routing."""
        return self.query_source in ("state", "frozen_random")

    @property
    def uses_summary(self) -> bool:
        """Whether queries see the earlier blocks' states (with one block there are none)."""
        return self.uses_state and self.use_depth_summary and self.num_blocks > 1
