"""The growing atom bank: one slice of atoms a stage on one tuner, and a gate that says whose atoms answer a row.

    y_l = W_l h_l + (lora_alpha / r) sum_{i in use(row)} B_{i,l} S_i(token) A_{i,l} h_l

Slice i is an adapter of the tuner: its own atoms, router and B_{i,l}, written in stage i and frozen after it. With
``frozen_A_seed`` all slices read the same A_l, which then costs nothing to keep. ``gate`` chooses one stage for each
row from the row's own text and instruction, or none; the slices of that stage, its own or those that it shares with or
reads from earlier stages, are in use for the row.

The routes of a row over the whole bank, one weight for abstaining and one for each atom, sum to 1: a slice in use
shares the row's weight evenly with the others in use and spreads it over its atoms as its router says.

Shapes: B rows, L tokens of a row's own text, T tokens of a pass, F features, E width of an instruction's encoding.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from continual.adapters.growing.factored import Factored
from continual.adapters.growing.gate import StageGate
from continual.adapters.queryable.row_slices import RowSlices
from continual.compat.torch import live_buffers, live_parameters

if TYPE_CHECKING:
    from continual.adapters.queryable.layer import QueryableLinear
    from continual.adapters.queryable.model import QueryableLoraModel

_MOST_READ = 2**14
"""Texts whose features are kept, beside those of the batch at hand; 4 bytes a feature, on the CPU."""

Observer = Callable[[nn.Module, str, Tensor, Tensor], None]


class SlicedBank:
    """The slices of a tuner, which of them a pass uses, and the gate that decides.

    Args:
        tuner: Holds the slices, as adapters that are all active.
        gate: Chooses a stage for each row.
        depth: How many of the backbone's layers compute the features of a row's text.

    Attributes:
        in_use: Adapters that every row uses, in training say; None where the gate decides.
        chosen_B: Index of the stage that the gate chose for each row of the last pass; ``gate.ABSTAIN`` for none.
        reads: What the gate reads of a row, as a bank's folder says (``bank_folder``); empty in a run.
        factored: Of each slice, the matrices PLACE|A and PLACE|B that are kept in parts.
    """

    def __init__(self, tuner: QueryableLoraModel, gate: StageGate, depth: int) -> None:
        self.tuner, self.gate, self.depth = tuner, gate, depth
        self.in_use: list[str] | None = []
        self.chosen_B: Tensor | None = None
        self.observe: Observer | None = None
        self.reads: dict[str, Any] = {}
        self.factored: dict[str, dict[str, Factored]] = {}
        self._seen: tuple[Any, ...] = ()
        self._uses: dict[str, RowSlices | None] = {}
        self._read: dict[tuple[int, ...], Tensor] = {}

    @property
    def names(self) -> list[str]:
        """The slices' names, in the order that they were added."""
        return list(self.tuner.queryable_bank.keys())

    # -- one pass -----------------------------------------------------------------------------------------------------

    def uses(self, rows: dict[str, Tensor | None]) -> dict[str, RowSlices | None]:
        """Return the adapters that all rows of a pass use, with None; or, under other names, each row's own slices.

        Args:
            rows: The pass's ``ROW_KEYWORDS``. Where they are missing and the gate is to decide, nothing is in use.
        """
        if self.in_use is not None:
            return dict.fromkeys(self.in_use)
        features = rows["text_ids"] if rows["row_features"] is None else rows["row_features"]
        if features is None:
            self.chosen_B = None
            return {}
        given = (*self.names, *self.gate.stages, *rows.values())
        if self.chosen_B is None or [*map(id, given)] != [*map(id, self._seen)]:  # generation asks for every token
            self._seen, self.chosen_B = given, self.choose(rows)
            self._uses = self._uses_of(self.chosen_B)
        return self._uses

    def _uses_of(self, chosen_B: Tensor) -> dict[str, RowSlices | None]:
        """Return what the chosen stages read: each row's first slice, then its second, as far as any has one."""
        stages = [anchors.adapters for anchors in self.gate.stages.values()]
        reads = [stages[index] if index >= 0 else [] for index in chosen_B.tolist()]
        if all(own == reads[0] for own in reads):
            return dict.fromkeys(reads[0])
        columns = itertools.zip_longest(*reads)
        return {f"slice.{place}": RowSlices(list(column), chosen_B.device) for place, column in enumerate(columns)}

    def choose(self, rows: dict[str, Tensor | None]) -> Tensor:
        """Return the index of each row's stage, (B,); see ``StageGate.choose``."""
        features, lengths = self.features(rows) if rows["text_ids"] is None else self._known_features(rows["text_ids"])
        return self.gate.choose(features, lengths, rows["gate_instruction"])

    def stages_of(self, chosen_B: Tensor) -> list[str]:
        """Return the names of the stages that ``choose`` chose; "" for none."""
        names = [*self.gate.stages, ""]  # the last one is ABSTAIN's
        return [names[index] for index in chosen_B.tolist()]

    def _known_features(self, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ``features`` of texts, each computed once: test rows are scored after every stage."""
        texts = [tuple(token for token in row if token >= 0) for row in ids_BL.tolist()]
        if new := [place for place, text in enumerate(texts) if text not in self._read]:
            if len(self._read) + len(new) > _MOST_READ:
                self._read, new = {}, list(range(len(texts)))
            found, _ = self.features({"text_ids": ids_BL[new], "row_features": None})
            self._read |= {texts[place]: own for place, own in zip(new, found.cpu(), strict=True)}
        features = torch.stack([self._read[text] for text in texts])
        return features.to(ids_BL.device), torch.tensor([len(text) for text in texts], device=ids_BL.device)

    @torch.no_grad()
    def features(self, rows: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        """Return features of each row's own text, (B, F), and how many tokens they are from, (B,).

        The mean over tokens, without the first one, which attention uses as a sink, of the frozen backbone's hidden
        states at ``depth``, each scaled to unit root mean square; a row of numbers is its own feature.
        """
        given = rows["row_features"]
        if given is not None:
            return given.float(), torch.full((len(given),), 10**6, device=given.device)
        ids = cast(Tensor, rows["text_ids"])
        mask = ids >= 0
        lengths = mask.sum(dim=1)
        hidden = _hidden_states(self.tuner.model, ids.clamp_min(0), self.depth)
        kept = mask & ((torch.arange(ids.shape[1], device=ids.device) > 0) | (lengths == 1).unsqueeze(1))
        states = F.rms_norm(hidden.float(), hidden.shape[-1:]) * kept.unsqueeze(-1)
        return states.sum(dim=1) / kept.sum(dim=1, keepdim=True).clamp_min(1), lengths

    def join(self, routes: dict[str, list[Tensor]], shape: tuple[int, int]) -> list[Tensor]:
        """Return the routes of a pass over the whole bank, of each block, (B, T, 1 + atoms of all slices).

        Args:
            routes: What ``record_routes`` gave for the pass.
            shape: (B, T) of the pass.
        """
        device = next(self.tuner.model.parameters()).device
        weights = self._weights(list(routes), shape[0], device)
        banks = {name: cast(Any, self.tuner.queryable_bank[name]).config for name in self.names}
        joined = []
        for block in range(max(config.num_blocks for config in banks.values())):
            total = torch.stack([weights[name] for name in routes]).sum(dim=0) if routes else weights[""]
            parts = [(1 - total).view(-1, 1, 1).expand(*shape, 1)]
            for name, config in banks.items():
                if name in routes:
                    route = routes[name][block].float()
                    route = route if route.dim() == 3 else route.unsqueeze(1)
                    parts.append(route * weights[name].view(-1, 1, 1))
                else:
                    parts.append(torch.zeros(*shape, config.num_atoms, device=device))
            joined.append(torch.cat(parts, dim=-1))
        return joined

    def _weights(self, names: list[str], num_rows: int, device: torch.device) -> dict[str, Tensor]:
        """Return each slice's share of each row, (B,); under "" nothing of every row."""
        weights = {name: torch.zeros(num_rows, device=device) for name in ["", *names]}
        if self.in_use is not None:
            return weights | {name: torch.full((num_rows,), 1 / len(names), device=device) for name in names}
        if self.chosen_B is not None:
            for index, anchors in enumerate(self.gate.stages.values()):
                for name in anchors.adapters:
                    if name in names:
                        weights[name] += (self.chosen_B == index).float() / len(anchors.adapters)
        return weights

    # -- growing ------------------------------------------------------------------------------------------------------

    @contextmanager
    def using(self, names: list[str] | None) -> Iterator[None]:
        """Use these adapters for every row inside the ``with``."""
        before, self.in_use = self.in_use, names
        try:
            yield
        finally:
            self.in_use = before

    @contextmanager
    def observing(self, observe: Observer) -> Iterator[None]:
        """Show every layer's u = A h, and what its B is applied to, to ``observe`` inside the ``with``."""
        self.observe = observe
        try:
            yield
        finally:
            self.observe = None

    def train_only(self, name: str) -> None:
        """Freeze every slice but one."""
        for other in self.names:
            self.tuner.set_requires_grad(other, other == name)

    def layers(self, name: str) -> dict[str, QueryableLinear]:
        """Return the layers that hold the slice ``name``, by their names in the model."""
        from continual.adapters.queryable.layer import QueryableLinear

        named = self.tuner.model.named_modules()
        return {place: m for place, m in named if isinstance(m, QueryableLinear) and name in m.queryable_B}

    def _places(self, name: str) -> list[tuple[Any, str]]:
        """Return where each tensor of a slice is registered: a mapping, and the tensor's key there."""
        bank = self.tuner.queryable_bank[name]
        registered = live_parameters(bank), live_buffers(bank)
        own: list[tuple[Any, str]] = [(kept, key) for kept in registered for key in kept]
        layers = self.layers(name).values()
        return own + [(kept, name) for layer in layers for kept in (layer.queryable_A, layer.queryable_B)]

    def idle(self) -> list[Tensor]:
        """Return the tensors of slices that no row uses; none where the gate decides."""
        names = [] if self.in_use is None else [name for name in self.names if name not in self.in_use]
        return [kept[key] for name in names for kept, key in self._places(name)]

    @torch.no_grad()
    def exchange(self, one: str, other: str) -> None:
        """Exchange the tensors of two slices, but not what they hold.

        A new slice is thus trained where the last one was, and what is recorded of that stage's passes serves it too.
        """
        for (kept, key), (kept_other, key_other) in zip(self._places(one), self._places(other), strict=True):
            tensor, another = kept[key], kept_other[key_other]
            held = tensor.clone()
            tensor.copy_(another)
            another.copy_(held)
            kept[key], kept_other[key_other] = another, tensor

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        """Start the slice ``target`` from what ``source`` is."""
        self.tuner.queryable_bank[target].load_state_dict(self.tuner.queryable_bank[source].state_dict())
        for layer in self.layers(target).values():
            layer.queryable_A[target].copy_(layer.queryable_A[source])
            layer.queryable_B[target].copy_(layer.queryable_B[source])

    def matrices(self, name: str) -> dict[str, Tensor]:
        """Return the slice's PLACE|B of each layer, (d_out, r), and PLACE|A, (r, d_in), where it is trained."""
        found: dict[str, Tensor] = {}
        for place, layer in self.layers(name).items():
            if name not in layer.frozen_A:
                found[f"{place}|A"] = layer.queryable_A[name]
            found[f"{place}|B"] = layer.queryable_B[name]
        return found

    @torch.no_grad()
    def factor(self, name: str, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Put left right, (rows, k) and (k, columns), in the place of some of a slice's matrices.

        Parts of the product are what is kept, where they are fewer numbers than the matrix.
        """
        matrices, kept = self.matrices(name), self.factored.setdefault(name, {})
        for key, (left, right) in factors.items():
            parts = Factored.of(left, right)
            matrices[key].copy_(parts.matrix())
            kept.pop(key, None)
            if parts.num_numbers < matrices[key].numel():
                kept[key] = parts

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return what has to be kept of a slice: atoms, router, B and, where it is trained, A, or parts of them."""
        kept = {f"bank|{key}": value.detach() for key, value in self.tuner.queryable_bank[name].state_dict().items()}
        factored = self.factored.get(name, {})
        for key, matrix in self.matrices(name).items():
            if key in factored:
                kept |= {f"{key}|{part}": tensor for part, tensor in factored[key].tensors().items()}
            else:
                kept[key] = matrix.detach()
        return kept

    @torch.no_grad()
    def restore(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Take up what ``tensors`` gave, into the slice ``name``, which is there already."""
        bank = self.tuner.queryable_bank[name]
        bank.load_state_dict({key[5:]: value for key, value in tensors.items() if key.startswith("bank|")})
        factored = self.factored[name] = dict[str, Factored]()
        for key, matrix in self.matrices(name).items():
            if key not in tensors:
                factored[key] = Factored.read(tensors, key, matrix.shape)
            matrix.copy_(tensors[key] if key in tensors else factored[key].matrix())

    def num_numbers(self, name: str) -> int:
        """Return how many numbers a slice keeps."""
        return sum(tensor.numel() for tensor in self.tensors(name).values())


class _ReachedError(Exception):
    """The layer whose input was wanted is reached."""


def _hidden_states(model: nn.Module, ids_BL: Tensor, depth: int) -> Tensor:
    """Return the frozen backbone's hidden states after ``depth`` layers, (B, L, F); later layers do not run."""
    decoder = cast(Any, model).get_decoder()
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _ReachedError

    handle = decoder.layers[depth].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        # No adapter has a state in this pass: the layers compute what they did before any was put in.
        decoder(input_ids=ids_BL, use_cache=False, routing_state={})
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return found[0]
