"""Whose atoms answer a row: the growing bank's gate over stages, from the row's own text and its instruction.

The bank's routing logits have two parts, as the paper's have, and each is anchored for every stage that is learnt:

    state    log (1/C) sum_c exp(-D(f, mu_c) / (2 T))       f: the row's features, mu_c: the stage's stored centroids
    prior    cos(e, e_t) / tau                              e: encoding of the instruction, e_t: the stage's own

    D = d^2 / (v + 1 / m) + k log(1 + 1 / (m v))            v = 1 + a / n: n tokens; m: rows that mu_c was computed from

d^2 is the Mahalanobis distance under one covariance that all stages share (linear discriminant analysis with a mixture
of centroids for each stage). The mean over n tokens varies more the fewer there are; the mean over m rows is itself
uncertain, which widens the density of a further row by as much and, over the k dimensions that the features have under
that covariance, lowers it: else a stage of few rows would lose its own to one of many. For the same reason a centroid
leans towards the mean of its stage, as if ``pooling`` more rows lay there (partial pooling).

A stage may have a row if it scores above one at the stage's own edge (its ``radius``) with an unrelated instruction,
and above the ``background``: centroids of what the backbone writes by itself, which is what a row looks like that is no
task's; where the stage has an instruction and the row has none, by ``untold_margin``. What no stage may have is
answered by the backbone as it is. The choice is hard, one stage a row or none, and whether a stage may have a row is
its own matter: a stage that is not chosen has no part in a row's answer, to the last bit, nor has it in the choice,
whether it is there or dropped.

Centroids, encodings and the covariance are all that is kept: no rows. (Choices throughout: the paper has no stages.)

Shapes: B rows, F features, E width of an instruction's encoding, S stages, C centroids of a stage.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ABSTAIN = -1
_FOLDS = 5


@dataclass
class Anchors:
    """What the gate keeps of one stage.

    Attributes:
        centroids_CF: Means of the stage's rows, one a label (or a cluster), (C, F).
        rows_C: How many rows each is the mean of, counted as rows of many tokens, those of ``pooling`` with them, (C,).
        radius: Distance to the stage, -2 T times the state's part, that 99 of 100 of its own rows stay within; it moves
            with the covariance, by as much as rows known before do on average.
        instruction_E: The instruction's encoding, (E,), of unit length; zeros for none.
        adapters: Names of the adapters that answer the stage's rows together, its own last.
    """

    centroids_CF: Tensor
    rows_C: Tensor
    radius: float
    instruction_E: Tensor
    adapters: list[str] = field(default_factory=list)


class StageGate:
    """Chooses a stage for each row, or none.

    Args:
        num_features: F.
        instruction_dim: E.
        temperature: T, of the state's part; above 1 because features are far from normal.
        prior_temperature: tau, of the instruction's part.
        abstain_cosine: Cosine that an unrelated instruction has to a stage's own.
        length_scale: a, in tokens.
        shrinkage: Share of the covariance that is taken from a round one of the same size.
        pooling: Rows, at the mean of its stage, that a centroid counts besides its own where the stage has several.
        untold_margin: Nats by which a row without an instruction has to be above the background for a stage that has
            one: text alone is the likelier to be no task's.
    """

    def __init__(
        self,
        num_features: int,
        instruction_dim: int,
        temperature: float = 3.0,
        prior_temperature: float = 0.05,
        abstain_cosine: float = 0.35,
        length_scale: float = 20.0,
        shrinkage: float = 0.05,
        pooling: float = 5.0,
        untold_margin: float = 3.0,
    ) -> None:
        self.temperature, self.prior_temperature = temperature, prior_temperature
        self.abstain_cosine, self.length_scale, self.shrinkage = abstain_cosine, length_scale, shrinkage
        self.pooling, self.untold_margin = pooling, untold_margin
        self.stages: dict[str, Anchors] = {}
        self.background_CF, self.background_rows_C = torch.zeros(0, num_features), torch.zeros(0)
        self.scatter_FF = torch.zeros(num_features, num_features, dtype=torch.float64)
        self.num_rows = 0
        self.instruction_dim = instruction_dim
        self._ready: tuple[torch.device, tuple[Tensor, ...]] | None = None

    # -- learning -----------------------------------------------------------------------------------------------------

    def set_background(self, features_nF: Tensor, lengths_n: Tensor, groups_n: Tensor) -> None:
        """Take up rows that belong to no stage; see ``add``."""
        centroids = self._centroids(features_nF.double().cpu(), lengths_n.cpu(), groups_n.cpu())
        self.background_CF, self.background_rows_C = centroids

    def add(self, name: str, features_nF: Tensor, lengths_n: Tensor, groups_n: Tensor, instruction_E: Tensor) -> Tensor:
        """Anchor a stage.

        Args:
            name: The stage.
            features_nF: Features of its training rows, (n, F).
            lengths_n: Tokens that each was computed from.
            groups_n: Group of each row, (n,) integers; a centroid is kept for each group.
            instruction_E: Encoding of its instruction; zeros for none.

        Returns:
            The index of the stage that scores each row highest, (n,), where the row itself was not learnt from.
        """
        features, lengths, groups = features_nF.double().cpu(), lengths_n.cpu(), groups_n.cpu()
        encoding = F.normalize(instruction_E.float().cpu(), dim=0)
        # Rows lie nearer to centroids and a covariance that were computed from them than others of their kind do, and
        # the fewer they are, the more so: the radius is that of rows held out, a fold at a time.
        num_folds = min(_FOLDS, len(features))
        fold = torch.randperm(len(features), generator=torch.Generator().manual_seed(0)) % num_folds
        before, states = (self.scatter_FF.clone(), self.num_rows), []
        best = torch.full((len(features),), len(self.stages))
        for index in range(num_folds if num_folds > 1 else 0):
            out = fold == index
            self._learn(name, features[~out], lengths[~out], groups[~out], encoding)
            states.append(self._state(features[out], lengths[out])[:, -1])
            best[out] = self._scores(features[out], lengths[out], encoding.expand(int(out.sum()), -1))[:, 1:].argmax(1)
            self.scatter_FF, self.num_rows = before[0].clone(), before[1]
        known, shrunk = self._covariances()
        self._learn(name, features, lengths, groups, encoding)
        # Under the covariance as it is now, rows of earlier stages lie further off, or nearer: their edges move along.
        moved = _mean_distance(known, self._covariances()[1]) / max(_mean_distance(known, shrunk), 1e-12)
        for anchors in [anchors for other, anchors in self.stages.items() if other != name]:
            anchors.radius *= moved
        own = torch.cat(states) if states else self._state(features, lengths)[:, -1]
        self.stages[name].radius = (-2 * self.temperature * own).quantile(0.99).item()
        self._ready = None
        return best

    def _learn(self, name: str, features: Tensor, lengths: Tensor, groups: Tensor, encoding_E: Tensor) -> None:
        """Take up some rows of a stage: its centroids, and their part of the covariance."""
        self.stages[name] = Anchors(*self._centroids(features, lengths, groups), 0.0, encoding_E)

    def _centroids(self, features: Tensor, lengths: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows' centroids and of how many each is, and add what rows vary by to the covariance."""
        weight = self._spread(lengths).double()
        groups = groups.unique(return_inverse=True)[1]
        share = F.one_hot(groups).double() / weight.unsqueeze(1)
        rows = share.sum(dim=0)
        centroids = (share.T @ features) / rows.unsqueeze(1)
        residuals = (features - centroids[groups]) / weight.sqrt().unsqueeze(1)
        self.scatter_FF += residuals.T @ residuals
        self.num_rows += len(features)
        self._ready = None
        if len(rows) > 1:
            towards = self.pooling * (rows @ centroids) / rows.sum()
            centroids = (rows.unsqueeze(1) * centroids + towards) / (rows + self.pooling).unsqueeze(1)
            rows = rows + self.pooling
        return centroids.float(), rows.float()

    def drop(self, name: str) -> Anchors:
        """Forget a stage's anchors. The covariance, which tells no stages apart, stays: so do the others' choices."""
        self._ready = None
        return self.stages.pop(name)

    # -- choosing -----------------------------------------------------------------------------------------------------

    def distances(self, features_BF: Tensor, lengths_B: Tensor) -> Tensor:
        """Return D to every centroid of the background and of every stage in turn, (B, sum of C)."""
        whiten, centre, centroids, rows, size, _, _ = self._prepared(features_BF.device)
        points, spread = (features_BF.float() - centre) @ whiten, self._spread(lengths_B).unsqueeze(1)
        widened = 1 + 1 / (rows * spread)
        return torch.cdist(points, centroids).square() / (spread * widened) + size * widened.log()

    def logits(self, features_BF: Tensor, lengths_B: Tensor, instruction_BE: Tensor | None) -> Tensor:
        """Return the logits of abstaining, the lowest number, and of each stage, -inf where it may not have the row.

        The shape is (B, 1 + S).

        Args:
            features_BF: Features of each row's own text, (B, F).
            lengths_B: Tokens they were computed from, (B,); 0 for a row without text, whose state then says nothing.
            instruction_BE: Encoding of each row's instruction, (B, E); a row of zeros, or None: no instruction.
        """
        instructions, radii = self._prepared(features_BF.device)[-2:]
        background, scores = self._scores(features_BF, lengths_B, instruction_BE).split([1, len(radii)], dim=1)
        edge = -radii / (2 * self.temperature) * (lengths_B > 0).unsqueeze(1)
        untold = _given(instructions).T  # stages that have an instruction, where the row has none
        if instruction_BE is not None:
            edge, untold = edge + self._unrelated(instruction_BE), untold & ~_given(instruction_BE)
        least = torch.maximum(edge, background + self.untold_margin * untold)
        scores = scores.masked_fill(scores <= least, -torch.inf)
        abstain = torch.full_like(background, torch.finfo(scores.dtype).min)
        return torch.cat([abstain, scores], dim=1)

    def _scores(self, features_BF: Tensor, lengths_B: Tensor, instruction_BE: Tensor | None) -> Tensor:
        """Return how well the background and each stage go with each row, (B, 1 + S)."""
        instructions = self._prepared(features_BF.device)[-2]
        scores = self._state(features_BF, lengths_B) * (lengths_B > 0).unsqueeze(1)
        if not len(self.background_CF):
            scores[:, 0] = -torch.inf
        if instruction_BE is not None:
            # A row of zeros, no instruction, stays one: its cosines are 0.
            cosine = F.normalize(instruction_BE.float(), dim=1) @ instructions.T / self.prior_temperature
            scores = scores + torch.cat([self._unrelated(instruction_BE), cosine], dim=1)
        return scores

    def _unrelated(self, instruction_BE: Tensor) -> Tensor:
        """Return the instruction's part of a logit that it has nothing to do with, (B, 1); 0 where there is none."""
        return self.abstain_cosine * _given(instruction_BE) / self.prior_temperature

    def _state(self, features_BF: Tensor, lengths_B: Tensor) -> Tensor:
        """Return the state's part of the background's and of each stage's logit, (B, 1 + S)."""
        scores = -self.distances(features_BF, lengths_B) / (2 * self.temperature)
        owner = self._owner().to(scores.device)
        places = [owner == index for index in range(-1, len(self.stages))]
        return torch.stack([scores[:, own].logsumexp(dim=1) - own.sum().log() for own in places], dim=1)

    def choose(self, features_BF: Tensor, lengths_B: Tensor, instruction_BE: Tensor | None = None) -> Tensor:
        """Return the index of each row's stage, (B,), ``ABSTAIN`` for none; see ``logits``."""
        if not self.stages:
            return torch.full_like(lengths_B, ABSTAIN)
        return self.logits(features_BF, lengths_B, instruction_BE).argmax(dim=1) - 1

    def _spread(self, lengths: Tensor) -> Tensor:
        """Return how much more than a long row's features those of a row of so many tokens vary."""
        return 1 + self.length_scale / lengths.clamp_min(1).float()

    def _owner(self) -> Tensor:
        """Return the stage's index of every centroid; -1 for the background's."""
        sizes = [len(anchors.centroids_CF) for anchors in self.stages.values()]
        return torch.arange(-1, len(sizes)).repeat_interleave(torch.tensor([len(self.background_CF), *sizes]))

    def _covariances(self) -> tuple[Tensor, Tensor]:
        """Return the covariance of rows about their centroids, as it is and shrunk, (F, F)."""
        covariance = self.scatter_FF / max(1, self.num_rows)
        scale = covariance.diagonal().mean().clamp_min(1e-12)
        return covariance, (1 - self.shrinkage) * covariance + self.shrinkage * scale * torch.eye(len(covariance))

    def _prepared(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return what scoring takes, on a device.

        The whitening map and the centre, the whitened centroids and their rows, the number k of dimensions, the
        instructions and the radii.
        """
        if self._ready is None or self._ready[0] != device:
            covariance, shrunk = self._covariances()
            whiten = torch.linalg.inv(torch.linalg.cholesky(shrunk)).T
            stages = self.stages.values()
            centroids = torch.cat([self.background_CF, *[anchors.centroids_CF for anchors in stages]]).double()
            centre = centroids.mean(dim=0)
            parts = (
                whiten.float(),
                centre.float(),
                ((centroids - centre) @ whiten).float(),
                torch.cat([self.background_rows_C, *[anchors.rows_C for anchors in stages]]),
                torch.tensor(_mean_distance(covariance, shrunk)),
                torch.stack([anchors.instruction_E for anchors in stages]),
                torch.tensor([anchors.radius for anchors in stages]),
            )
            self._ready = (device, tuple(part.to(device) for part in parts))
        return self._ready[1]

    # -- on disk ------------------------------------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that the gate was made with."""
        names = ("temperature", "prior_temperature", "abstain_cosine", "length_scale", "shrinkage")
        names += ("pooling", "untold_margin")
        sizes = {"num_features": len(self.scatter_FF), "instruction_dim": self.instruction_dim}
        return sizes | {name: getattr(self, name) for name in names}

    @property
    def num_numbers(self) -> int:
        """How many numbers the gate keeps: anchors, and the covariance's half."""
        size = len(self.scatter_FF)
        kept = [(a.centroids_CF, a.rows_C, a.instruction_E) for a in self.stages.values()]
        anchors = sum(1 + sum(tensor.numel() for tensor in tensors) for tensors in kept)
        return anchors + self.background_CF.numel() + self.background_rows_C.numel() + size * (size + 1) // 2

    def tensors(self) -> dict[str, Tensor]:
        """Return what is kept, as named tensors; ``restore`` takes them up."""
        rows, columns = torch.tril_indices(*self.scatter_FF.shape)
        kept = {"scatter": self.scatter_FF[rows, columns], "num_rows": torch.tensor(self.num_rows)}
        kept |= {"background": self.background_CF, "background_rows": self.background_rows_C}
        for name, anchors in self.stages.items():
            kept[f"{name}|centroids"] = anchors.centroids_CF
            kept[f"{name}|rows"] = anchors.rows_C
            kept[f"{name}|radius"] = torch.tensor(anchors.radius, dtype=torch.float64)
            kept[f"{name}|instruction"] = anchors.instruction_E
        return kept

    def restore(self, tensors: dict[str, Tensor], adapters: dict[str, list[str]]) -> None:
        """Take up what ``tensors`` gave; ``adapters`` names the adapters of each stage, in the stages' order."""
        rows, columns = torch.tril_indices(*self.scatter_FF.shape)
        self.scatter_FF[rows, columns] = tensors["scatter"]
        self.scatter_FF[columns, rows] = tensors["scatter"]
        self.num_rows, self._ready = int(tensors["num_rows"]), None
        self.background_CF, self.background_rows_C = tensors["background"], tensors["background_rows"]
        self.stages = {
            name: Anchors(
                tensors[f"{name}|centroids"],
                tensors[f"{name}|rows"],
                tensors[f"{name}|radius"].item(),
                tensors[f"{name}|instruction"],
                own,
            )
            for name, own in adapters.items()
        }


def _mean_distance(covariance_FF: Tensor, metric_FF: Tensor) -> float:
    """Return the mean squared Mahalanobis distance, under one covariance, of rows that vary by another."""
    return torch.linalg.solve(metric_FF, covariance_FF).trace().item()


def _given(instruction_BE: Tensor) -> Tensor:
    """Return which encodings are of an instruction, not zeros, (B, 1)."""
    return instruction_BE.abs().amax(dim=1, keepdim=True) > 0
