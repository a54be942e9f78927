"""An adapter off its start, where a zero of its own hides what the rest of it computes."""

from __future__ import annotations

import torch

from continual.training.module import ContinualModule


def spread(module: ContinualModule, scale: float) -> None:
    """Add noise of ``scale`` to whatever trains, so that everything has a gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator).to(parameter.device))
