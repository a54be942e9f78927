"""The labels that a prompt is scored against, as a tree that stands behind it: what labels begin with is there once.

Shapes: L tokens of all labels, K nodes of their tree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
        later: Labels of stages to come; of each, the beginning that the tree predicts. No label is likelier than that.
        ids_L: Token ids of all labels, end marks included, one label after the other, then of the later beginnings.
        segment_L: Which label a token belongs to, the later ones last.
        after_L: Index of the node that predicts a token; -1 for the prompt.
        node_ids_K: Last token id of each node; what a node continues comes before it.
        path_KK: Whether a node (row) is, or continues, another (column).
    """

    names: tuple[str, ...]
    num_own: int
    later: tuple[str, ...]
    ids_L: Tensor
    segment_L: Tensor
    after_L: Tensor
    node_ids_K: Tensor
    path_KK: Tensor

    @property
    def depth_K(self) -> Tensor:
        """Tokens of each node before its last, (K,)."""
        return self.path_KK.sum(dim=1) - 1

    @classmethod
    def of(
        cls, backbone: CausalLM, own: Sequence[str], others: Sequence[str] = (), later: Sequence[str] = ()
    ) -> LabelTree:
        """Encode the labels ``own``, those of ``others`` not among them, and how those of ``later`` begin."""
        names = tuple(dict.fromkeys([*own, *others]))
        later = tuple(name for name in dict.fromkeys(later) if name not in names)
        encoded = [tuple(backbone.encode_answer(name)) for name in names]
        starts = dict.fromkeys(ids[:end] for ids in encoded for end in range(1, len(ids)))
        nodes = {start: index for index, start in enumerate(starts)}
        path = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
        for start, index in nodes.items():
            path[index, [nodes[start[:end]] for end in range(1, len(start) + 1)]] = True
        asked = [*encoded, *[_beginning(tuple(backbone.encode_answer(name)), nodes) for name in later]]
        return cls(
            names,
            len(own),
            later,
            torch.tensor([token for ids in asked for token in ids]),
            torch.tensor([index for index, ids in enumerate(asked) for _ in ids]),
            torch.tensor([nodes.get(ids[:end], -1) for ids in asked for end in range(len(ids))]),
            torch.tensor([start[-1] for start in nodes], dtype=torch.long),
            path,
        )


def _beginning(ids: tuple[int, ...], nodes: Mapping[tuple[int, ...], int]) -> tuple[int, ...]:
    """Return a label's tokens up to the first one that no node predicts: the prompt predicts one at least."""
    return ids[: next((end for end in range(1, len(ids)) if ids[:end] not in nodes), len(ids))]
