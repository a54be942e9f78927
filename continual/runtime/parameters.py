"""A module's parameters: which train, what the adapter brought, their gradients as one vector; and how passes run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from continual.compat.lightning import trainer_of
from continual.interfaces import AdaptedModule


def trainable(module: AdaptedModule) -> list[nn.Parameter]:
    """Return the trainable parameters, in the order that the model registers them."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def adapter_tensors(module: AdaptedModule) -> dict[str, Tensor]:
    """Return every tensor that the adapter brought, by name: what trains, and what else carries its tuner's prefix.

    They are views: writing into one changes the model.
    """
    assert module.model is not None
    prefix = getattr(module.model.base_model, "prefix", None)
    trains = {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}
    state = module.model.state_dict()
    return {name: t for name, t in state.items() if name in trains or (prefix is not None and prefix in name)}


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one float32 vector, (P,)."""
    return torch.cat([tensor.flatten().float() for tensor in tensors])


def flat_gradient(loss: Tensor, parameters: Sequence[nn.Parameter], retain_graph: bool = False) -> Tensor:
    """Return the gradient of ``loss`` as one vector, (P,); ``.grad`` stays as it is."""
    gradients = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
    return flat([torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout off inside the ``with``."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def forward_context(module: L.LightningModule) -> Any:
    """Return the context that training steps run in (mixed precision, say), for passes outside of one."""
    trainer = trainer_of(module)
    return nullcontext() if trainer is None else trainer.precision_plugin.forward_context()


def save_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write named tensors into ``folder``."""
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / "tensors.safetensors")


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Read what ``save_tensors`` wrote."""
    return load_file(folder / "tensors.safetensors")
