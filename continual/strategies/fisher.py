"""The diagonal of the Fisher information, by three estimators that are often taken for one another.

van de Ven 2025, 'On the Computation of the Fisher Information in Continual Learning', arXiv 2502.11756. With p the
model's own distribution at an answer's token, given the prompt and the true tokens before it:

    exact       mean over tokens of sum_v p(v) (d log p(v) / d theta)^2        a backward pass for each v: small V only
    sampled     the same, with one v drawn from p for each token               a backward pass a row
    empirical   the true token in the place of v                               a backward pass a row; not a Fisher
                                                                               information where the model does not fit
A row's tokens go through one backward pass. For 'sampled' the products between different tokens vanish in the mean; for
'empirical' they do not: it is the squared gradient of the answer's log-likelihood, over its number of tokens.
A regressor's p is a Gaussian of variance 1 around its prediction f(x): exact is the mean of (d f / d theta)^2.

Shapes: T answer tokens of a row, V vocabulary, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from continual.runtime.parameters import flat_gradient

Estimator = Literal["exact", "sampled", "empirical"]


def fisher_diagonal(
    rows: Iterable[tuple[Tensor, Tensor]],
    parameters: Sequence[nn.Parameter],
    estimator: Estimator,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the diagonal, (P,), a mean over tokens (a regressor: over rows).

    Args:
        rows: Of each row the logits (T, V) and the true tokens (T,); or a regressor's prediction and target, (1,) each.
        parameters: What the outputs are differentiated by.
        estimator: See the module's docstring.
        generator: Draws the tokens of 'sampled'; on the CPU.
    """
    total, count = torch.zeros(()), 0
    for outputs, targets in rows:
        count += len(targets)
        for weight, log_p in _log_likelihoods(outputs.float(), targets, estimator, generator):
            total = total + weight * flat_gradient(log_p, parameters, retain_graph=True).square()
    return total / max(1, count)


def _log_likelihoods(
    outputs: Tensor, targets: Tensor, estimator: Estimator, generator: torch.Generator | None
) -> Iterator[tuple[float, Tensor]]:
    """Yield the log-likelihoods of one row to differentiate, each with its weight."""
    if outputs.dim() == 1:
        if estimator == "exact":
            yield 1.0, outputs.sum()
        elif estimator == "sampled":
            yield 1.0, (outputs * torch.randn(outputs.shape, generator=generator).to(outputs.device)).sum()
        else:
            yield 1.0, -0.5 * (outputs - targets).square().sum()
        return
    log_p_TV = outputs.log_softmax(dim=-1)
    if estimator == "exact":
        for log_p_V in log_p_TV:
            for log_p in log_p_V:
                yield log_p.exp().item(), log_p
        return
    if estimator == "sampled":
        p_TV = log_p_TV.detach().exp().cpu()
        targets = torch.multinomial(p_TV, 1, generator=generator).squeeze(1).to(outputs.device)
    yield 1.0, log_p_TV.gather(1, targets.unsqueeze(1)).sum()
