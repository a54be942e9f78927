"""The labels that a prompt is scored against, as a tree that stands behind it: what labels begin with is there once.

Shapes: L tokens of all labels, K nodes of their tree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from continual.backbones import CausalLM


@dataclass  # not frozen: Lightning moves its tensors to the device
class LabelTree:
    """The labels that a row's prompt is scored against, as a tree whose nodes one pass computes.

    A node is what one or several labels begin with, short of a whole label: a label's last token, its end mark, is only
    ever predicted.

    Attributes:
        names: Label texts; the first ``num_own`` are the task's own, the rest were seen in other stages.
        num_own: How many are the task's own.
        ids_L: Token ids of all labels, end marks included, one label after the other, then of ``further``.
        segment_L: Which label a token belongs to, ``further`` last.
        after_L: Index of the node that predicts a token; -1 for the prompt.
        node_ids_K: Last token id of each node; what a node continues comes before it.
        path_KK: Whether a node (row) is, or continues, another (column).
        further: Whatever else is scored behind the labels, by name; none by default.
    """

    names: tuple[str, ...]
    num_own: int
    ids_L: Tensor
    segment_L: Tensor
    after_L: Tensor
    node_ids_K: Tensor
    path_KK: Tensor
    further: tuple[str, ...] = ()

    @property
    def depth_K(self) -> Tensor:
        """Tokens of each node before its last, (K,)."""
        return self.path_KK.sum(dim=1) - 1

    @property
    def num_entries(self) -> int:
        """C: the labels, and what else is scored."""
        return len(self.names) + len(self.further)

    @classmethod
    def of(cls, backbone: CausalLM, own: Sequence[str], others: Sequence[str] = ()) -> LabelTree:
        """Encode the labels ``own``, and those of ``others`` that are not among them."""
        names = tuple(dict.fromkeys([*own, *others]))
        encoded = [tuple(backbone.encode_answer(name)) for name in names]
        starts = dict.fromkeys(ids[:end] for ids in encoded for end in range(1, len(ids)))
        nodes = {start: index for index, start in enumerate(starts)}
        path = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
        for start, index in nodes.items():
            path[index, [nodes[start[:end]] for end in range(1, len(start) + 1)]] = True
        return cls(
            names,
            len(own),
            torch.tensor([token for ids in encoded for token in ids]),
            torch.tensor([index for index, ids in enumerate(encoded) for _ in ids]),
            torch.tensor([nodes.get(ids[:end], -1) for ids in encoded for end in range(len(ids))]),
            torch.tensor([start[-1] for start in nodes], dtype=torch.long),
            path,
        )

    def with_beginnings(self, backbone: CausalLM, labels: Sequence[str]) -> LabelTree:
        """Return the tree with how other labels begin among what it scores, under their names in ``further``.

        Of each, those tokens count that the tree predicts already, the first one at least: no label is likelier than
        it begins. No node is added.
        """
        names = tuple(name for name in dict.fromkeys(labels) if name not in self.names)
        nodes = {tuple(self.node_ids_K[path].tolist()): index for index, path in enumerate(self.path_KK)}
        begun = [_beginning(tuple(backbone.encode_answer(name)), nodes) for name in names]
        asked = list(enumerate(begun, start=len(self.names)))
        after = [nodes.get(ids[:end], -1) for ids in begun for end in range(len(ids))]
        return replace(
            self,
            ids_L=_joined(self.ids_L, [token for ids in begun for token in ids]),
            segment_L=_joined(self.segment_L, [index for index, ids in asked for _ in ids]),
            after_L=_joined(self.after_L, after),
            further=names,
        )


def _joined(tensor: Tensor, numbers: list[int]) -> Tensor:
    return torch.cat([tensor, torch.tensor(numbers, dtype=torch.long)])


def _beginning(ids: tuple[int, ...], nodes: Mapping[tuple[int, ...], int]) -> tuple[int, ...]:
    """Return a label's tokens up to the first one that no node predicts: the prompt predicts one at least."""
    return ids[: next((end for end in range(1, len(ids)) if ids[:end] not in nodes), len(ids))]
