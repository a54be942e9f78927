"""The atom bank and its router: which low-rank update atoms a token uses, from its state and its task's instruction.

Queryable LoRA, arXiv 2605.08423. For one token and block b of consecutive layers:

    z_b     = RMSNorm(u_b)                                    u_b: low-rank state of the block's first projection
    s_b     = sum_{j<b} softmax_j(w_b . z_j) z_j              depth summary, s_1 = 0
    q_b     = W_b [z_b ; s_b]                                 query
    pi(c)   = softmax_m(<P e(c), p_m> / tau)                  prior of the instruction c, e(c) a frozen encoding
    g_b     = K q_b / sqrt(d_k) + lambda log pi(c)            routing logits
    alpha_b = softmax over the top-k logits                   at most k of M weights non-zero, summing to 1
    S_b     = sum_m alpha_bm C_m                              routed operator, (r, r) for a token

S_b is made once a block and token, by one matrix product, and kept for all projections of the block: 64 numbers at a
rank of 8. Each projection then costs one small product a token, whatever the number of atoms. Compiled code keeps
S_b and z_b of a block for the way back and computes routes, u and S_b u again: less is kept than for plain LoRA.

Shapes: B batch, T tokens, r rank, M atoms, N blocks, Q key width d_k, P prior width, E width of an encoding; `...` is
whatever stands before the last axis of the adapted layer's input, (B, T) or (B,).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from continual.adapters.config import QueryableLoraConfig

_Made = TypeVar("_Made")


class SharedState:
    """What all blocks of one adapter have in common during ONE forward pass.

    It is no dataclass: FSDP looks into those among a layer's keywords and puts copies in their place.

    Args:
        atoms: The bank's atoms times lora_alpha / r, (M, r, r).
        log_prior_BM: lambda * log pi(c) of each row, (B, M), or of each token, (B, T, M); None where the prior is off.

    Attributes:
        observe: Called with a layer, the adapter's name, u = A h and what B is applied to, (lora_alpha / r) S_b u, both
            (..., r); None for nobody.
        removed: The atom that no token may use; None for none.
    """

    def __init__(self, atoms: Tensor, log_prior_BM: Tensor | None) -> None:
        self.atoms, self.log_prior_BM = atoms, log_prior_BM
        self.observe: Callable[[nn.Module, str, Tensor, Tensor], None] | None = None
        self.removed: int | None = None


class RoutingState:
    """One adapter's state of ONE forward pass; made anew for each, never kept on the bank.

    State kept on a module between passes gives silently wrong gradients once two forward passes precede a backward
    pass that recomputes activations; an object of its own for each pass is exact there too. Nothing in it refers back
    to it: a pass's graph, with all that it has kept, is gone as soon as the last user of its loss is, and does not wait
    for Python's collector of cycles. It is no dataclass, as ``SharedState`` is none.

    Args:
        shared: What the blocks have in common.

    Attributes:
        blocks: What the layers of each block share.
    """

    def __init__(self, shared: SharedState) -> None:
        self.shared = shared
        self.blocks: list[BlockState] = []

    @property
    def routes(self) -> list[Tensor | None]:
        """alpha_b of each block, (..., M); None of those that are still to come."""
        return [block.route for block in self.blocks]


@dataclass
class BlockState:
    """One block's part of a ``RoutingState``: tensors alone, so that layers of all blocks compile to the same code.

    Attributes:
        shared: What the pass's blocks have in common.
        before: The blocks before this one.
        query_map: W_b, (Q, r or 2 r); None where the query takes no state.
        summary_query: w_b, (r,); None in the first block and where there is no summary.
        asked_BM: Where the instruction asks, its query in this block compared with the keys, as ``log_prior_BM``; None
            otherwise.
        earlier: z of the blocks before this one, (..., b, r); see ``gather``.
        state: z_b, (..., r), once the block's first layer has routed.
        route: alpha_b, (..., M), likewise.
        operator: (lora_alpha / r) S_b, (..., r, r), likewise.
    """

    shared: SharedState
    before: list[BlockState]
    query_map: Tensor | None
    summary_query: Tensor | None
    asked_BM: Tensor | None = None
    earlier: Tensor | None = None
    state: Tensor | None = None
    route: Tensor | None = None
    operator: Tensor | None = None

    def gather(self) -> None:
        """Collect the earlier blocks' states for the depth summary, if all of them are there."""
        states = [block.state for block in self.before if block.state is not None]
        if self.summary_query is not None and len(states) == len(self.before):
            self.earlier = torch.stack(states, dim=-2)


class AtomBank(nn.Module):
    """The atoms C_m, their keys, the query maps of every block and the instruction prior of one adapter.

    Symbols of the paper: atoms = C, keys = K, query_maps = W_b, summary_queries = w_b, prior_map = P, prior_keys = p.

    Args:
        config: The adapter's configuration.
        instruction_dim: Width E of an instruction's encoding; 0 where the prior is off.
    """

    atoms: Tensor
    query_maps: Tensor
    instruction_reference: Tensor

    def __init__(self, config: QueryableLoraConfig, instruction_dim: int) -> None:
        super().__init__()
        self.config = config
        num_atoms, rank, num_blocks = config.num_atoms, config.r, config.num_blocks
        self.atoms = nn.Parameter(initial_atoms(num_atoms, rank, config.init_atoms, config.init_atoms_scale))
        if config.uses_keys:
            key_dim = config.key_dim or 2 * rank
            width = config.prior_dim if not config.uses_state else 2 * rank if config.uses_summary else rank
            self.keys = nn.Parameter(torch.randn(num_atoms, key_dim))
            maps = torch.randn(num_blocks, key_dim, width) / math.sqrt(rank if config.uses_state else width)
            if config.query_source == "frozen_random":
                self.register_buffer("query_maps", maps)
            else:
                self.query_maps = nn.Parameter(maps)
            if config.uses_summary:
                self.summary_queries = nn.Parameter(torch.zeros(num_blocks - 1, rank))
        if config.uses_prior:
            self.prior_map = nn.Parameter(torch.randn(config.prior_dim, instruction_dim))
            self.prior_keys = nn.Parameter(torch.randn(num_atoms, config.prior_dim) / math.sqrt(config.prior_dim))
            self.register_buffer("instruction_reference", torch.zeros(instruction_dim))

    def begin(self, encoding_BE: Tensor | None, row_of_token: Tensor | None = None) -> RoutingState:
        """Start a forward pass.

        Args:
            encoding_BE: Encoding of each row's instruction, (B, E); a row of zeros, or None for the whole batch, means
                that no instruction is given: its prior is uniform.
            row_of_token: Where rows are packed into one, (1, T), the row of ``encoding_BE`` that each token is of.
        """
        # The scaling goes in here, once a pass, and not in every layer where it would be a float to compiled code.
        atoms = self.atoms * (self.config.lora_alpha / self.config.r)
        log_prior = projected = None
        if self.config.uses_prior and encoding_BE is not None:
            projected = self.project(encoding_BE)
            projected = projected if row_of_token is None else projected[row_of_token]
            log_prior = self.config.prior_weight * self.log_prior(projected)
        state = RoutingState(SharedState(atoms, log_prior))
        none = [None] * self.config.num_blocks
        maps = self.query_maps.unbind() if self.config.uses_state else none
        queries = [None, *self.summary_queries.unbind()] if self.config.uses_summary else none
        asked = none
        if projected is not None and self.config.query_source == "instruction_query":
            asked = [self._match(F.linear(projected, query_map)) for query_map in self.query_maps]
        for index, (query_map, summary_query, asked_BM) in enumerate(zip(maps, queries, asked, strict=True)):
            state.blocks.append(BlockState(state.shared, state.blocks[:index], query_map, summary_query, asked_BM))
        return state

    def project(self, encoding_BE: Tensor) -> Tensor:
        """Return P e(c), (B, P), of each row's instruction encoding, (B, E)."""
        return encoding_BE.to(self.prior_map.dtype) @ self.prior_map.T

    def log_prior(self, projected_BP: Tensor) -> Tensor:
        """Return log pi(c), (B, M), of each row's projected instruction, (B, P)."""
        return F.log_softmax(projected_BP @ self.prior_keys.T / self.config.prior_temperature, dim=-1)

    def centre(self, encoding_BE: Tensor) -> Tensor:
        """Subtract the fixed reference mean and scale to unit length; a row of zeros (no instruction) stays zero."""
        if encoding_BE.dim() != 2 or encoding_BE.shape[1] != len(self.instruction_reference):
            raise ValueError(
                f"instruction encodings have shape {tuple(encoding_BE.shape)}, but this adapter takes "
                f"(rows, {len(self.instruction_reference)}); see instruction_dim"
            )
        given = encoding_BE.abs().amax(dim=-1, keepdim=True) > 0
        centred = torch.where(given, encoding_BE.float() - self.instruction_reference.float(), 0.0)
        return F.normalize(centred, dim=-1)

    def route(self, block: BlockState, u: Tensor) -> None:
        """Compute and keep alpha and S of ``block`` from its first layer's low-rank state ``u``, (..., r)."""
        source = u.detach() if self.config.detach_query else u

        def routed() -> tuple[Tensor, Tensor, Tensor]:
            state = F.rms_norm(source, (self.config.r,), eps=1e-6)
            route = self._weights(self.logits(block, state), block.shared.removed)
            return state, route, routed_operator(route, block.shared.atoms)

        block.state, block.route, block.operator = recomputed(routed)

    def logits(self, block: BlockState, z: Tensor) -> Tensor:
        """Return the routing logits g, (..., M), of ``block`` at the state z, (..., r)."""
        config = self.config
        if block.query_map is None:
            logits = z.new_zeros(*z.shape[:-1], config.num_atoms)
        else:
            query_input = torch.cat([z, self.depth_summary(block, z)], dim=-1) if config.uses_summary else z
            logits = self._match(F.linear(query_input, block.query_map))
        prior = block.shared.log_prior_BM
        if prior is not None:
            prior = prior if block.asked_BM is None else prior + block.asked_BM
            if prior.shape[0] != logits.shape[0]:
                raise ValueError(
                    f"instructions for {prior.shape[0]} rows were given with a batch of {logits.shape[0]} rows"
                )
            between = [1] * (logits.dim() - prior.dim())
            logits = logits + prior.view(prior.shape[0], *between, *prior.shape[1:])
        return logits

    def _match(self, query: Tensor) -> Tensor:
        """Return a query, (..., Q), compared with every atom's key, (..., M)."""
        return F.linear(query, self.keys) / math.sqrt(self.keys.shape[-1])

    def depth_summary(self, block: BlockState, z: Tensor) -> Tensor:
        """Return s_b, (..., r): attention of this block's query vector over the states of the blocks before it."""
        if block.summary_query is None:
            return torch.zeros_like(z)
        if block.earlier is None:
            block.gather()
        assert block.earlier is not None
        weights = (block.earlier @ block.summary_query).softmax(dim=-1)
        return (weights.unsqueeze(-1) * block.earlier).sum(dim=-2)

    def apply_route(self, block: BlockState, u: Tensor) -> Tensor:
        """Return (lora_alpha / r) S_b u of G projections' u, (..., G, r), in its shape."""
        return apply_operator(block.operator, u)

    def _weights(self, logits: Tensor, removed: int | None = None) -> Tensor:
        if removed is not None:  # as in a bank without it
            before, _, after = logits.tensor_split([removed, removed + 1], dim=-1)
            weights = self._weights(torch.cat([before, after], dim=-1))
            before, after = weights.tensor_split([removed], dim=-1)
            return torch.cat([before, weights.new_zeros(*weights.shape[:-1], 1), after], dim=-1)
        num_atoms = logits.shape[-1]
        if self.config.top_k >= num_atoms or self.config.query_source == "uniform":
            return logits.softmax(dim=-1)  # equal logits have no top k
        routes = top_k_softmax(logits, self.config.top_k)
        if self.config.query_source.startswith("instruction"):  # no instruction: again equal logits
            tied = logits.amax(dim=-1, keepdim=True) == logits.amin(dim=-1, keepdim=True)
            routes = torch.where(tied, 1 / num_atoms, routes)
        return routes


def recomputed(function: Callable[[], _Made]) -> _Made:
    """Return what a function of no argument returns; compiled code computes it again on the way back.

    A pass then keeps what the function reads, and nothing of what it makes for itself.
    """
    if torch.compiler.is_compiling():
        return checkpoint(function, use_reentrant=False, preserve_rng_state=False)
    return function()


def apply_operator(operator: Tensor | None, u: Tensor) -> Tensor:
    """Return S u of G projections' u, (..., G, r), in its shape; S is each token's operator, (..., r, r)."""
    if operator is None:
        raise RuntimeError(
            "a block has no route yet: its first adapted projection did not run before this one. "
            "The layers ran in another order than they are registered in"
        )
    if torch.compiler.is_compiling():  # becomes one kernel with what stands before and after it
        return (operator.unsqueeze(-3) * u.unsqueeze(-2)).sum(dim=-1)
    return torch.bmm(u.flatten(0, -3), operator.flatten(0, -3).mT).view(u.shape)


def routed_operator(route: Tensor, atoms: Tensor) -> Tensor:
    """Return sum_m alpha_m C_m, (..., r, r), of routes, (..., M), and atoms, (M, r, r)."""
    return (route @ atoms.flatten(1)).unflatten(-1, atoms.shape[1:])


def top_k_softmax(logits: Tensor, top_k: int) -> Tensor:
    """Return the softmax over the ``top_k`` largest of the logits, (..., M); the other weights are 0."""
    top, index = logits.topk(top_k, dim=-1)
    weights = top.softmax(dim=-1)  # float32 under autocast, whatever the logits are
    return weights.new_zeros(logits.shape).scatter(-1, index, weights)


def initial_atoms(num_atoms: int, rank: int, kind: str, scale: float) -> Tensor:
    """Return the atoms' start, (M, r, r).

    Args:
        num_atoms: M.
        rank: r.
        kind: "identity" (C_m = I), "noise" (I + scale * N(0, 1 / r)) or "orthogonal" (random rotations Q_m mixed with
            the identity, C_m = (1 - scale) I + scale Q_m).
        scale: How far from the identity.
    """
    identity = torch.eye(rank).expand(num_atoms, rank, rank)
    if kind == "identity":
        return identity.clone()
    noise = torch.randn(num_atoms, rank, rank)
    if kind == "noise":
        return identity + scale * noise / math.sqrt(rank)
    rotations, upper = torch.linalg.qr(noise)
    rotations = rotations * upper.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return (1 - scale) * identity + scale * rotations
