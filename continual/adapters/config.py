"""The configuration of the Instruction-Queryable adapter: PEFT's field names where PEFT has one, ours for the rest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from peft.utils.peft_types import PeftType

from continual.adapters.base_config import RoutedLoraConfig
from continual.compat.peft import extend_peft_types

PEFT_NAME = "QUERYABLE"
QuerySource = Literal["state", "frozen_random", "instruction_query", "instruction_only", "uniform"]
AtomStart = Literal["orthogonal", "noise", "identity"]


extend_peft_types(PEFT_NAME)


@dataclass
class QueryableLoraConfig(RoutedLoraConfig):
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

    frozen_A_seed: int | None = field(
        default=None,
        metadata={
            "help": "Draw every A_l from this seed and never train it, so that adapters of one seed read the same "
            "low-rank states (arXiv 2402.16842: B carries most of what is learnt). Not given: A_l is trained."
        },
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
            "help": "What asks the bank: the state through trained maps ('state') or through frozen random ones "
            "('frozen_random'), a query made of the instruction, q_b = W_b P e(c), beside the prior "
            "('instruction_query'), the prior alone ('instruction_only'), or nothing, all atoms alike ('uniform')."
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
        for name, choices in (("query_source", get_args(QuerySource)), ("init_atoms", get_args(AtomStart))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        self._check_at_least_one("num_atoms", "top_k", "num_blocks", "prior_dim")
        if self.top_k > self.num_atoms:
            raise ValueError(f"top_k ({self.top_k}) is larger than num_atoms ({self.num_atoms})")
        if self.key_dim is not None and self.key_dim < 1:
            raise ValueError(f"key_dim must be at least 1, got {self.key_dim}")
        if self.frozen_A_seed is not None and self.frozen_A_seed < 0:
            raise ValueError(f"frozen_A_seed must not be negative, got {self.frozen_A_seed}")
        if self.prior_weight < 0:
            raise ValueError(f"prior_weight must not be negative, got {self.prior_weight}")
        if self.prior_temperature <= 0:
            raise ValueError(f"prior_temperature must be positive, got {self.prior_temperature}")
        if self.query_source in ("instruction_query", "instruction_only") and self.prior_weight == 0:
            raise ValueError(f"query_source {self.query_source!r} needs prior_weight above 0: it encodes instructions")

    @property
    def uses_prior(self) -> bool:
        """Whether the instruction prior takes part in the routing (and has parameters)."""
        return self.prior_weight > 0 and self.query_source != "uniform"

    @property
    def uses_state(self) -> bool:
        """Whether the token's state takes part in the routing."""
        return self.query_source in ("state", "frozen_random")

    @property
    def uses_keys(self) -> bool:
        """Whether a query, of the state or of the instruction, is compared with the atoms' keys."""
        return self.uses_state or self.query_source == "instruction_query"

    @property
    def uses_summary(self) -> bool:
        """Whether queries see the earlier blocks' states (with one block there are none)."""
        return self.uses_state and self.use_depth_summary and self.num_blocks > 1
