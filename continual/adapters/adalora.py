"""What AdaLoRA needs beside a loss: its orthogonality penalty, and its ranks handed out anew as training goes on.

Zhang et al. 2023, 'AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning', arXiv 2303.10512. PEFT
adds the penalty only where the model computes the loss itself, and leaves the calls of its allocator to the trainer.

The budget falls from ``init_r`` to ``target_r`` a module within each stage: ``total_step`` of the configuration is
replaced by the stage's own steps. A direction that is masked keeps its place, with a singular value of 0: the next
stage may use it again, and a run that is resumed goes on as one that was not.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor

from continual.compat.peft import adalora_adapter, adalora_directions, forget_importance, has_ranks_to_drop
from continual.errors import RunError


def tuner_of(model: Any) -> AdaLoraModel | None:
    """Return a PEFT model's AdaLoRA tuner, where it is one."""
    base = getattr(model, "base_model", None)
    return base if isinstance(base, AdaLoraModel) else None


def begin(model: Any, total_steps: int) -> None:
    """Start a stage of ``total_steps`` steps.

    Raises:
        RunError: The stage is too short for the configured warm-ups.
    """
    if (tuner := tuner_of(model)) is None:
        return
    config = _config(tuner)
    if config.tinit >= total_steps - config.tfinal:
        raise RunError(
            f"model.adapter: AdaLoRA's tinit ({config.tinit}) and tfinal ({config.tfinal}) leave none of the stage's "
            f"{total_steps} steps to hand out ranks in"
        )
    config.total_step, config.rank_pattern = total_steps, None
    forget_importance(tuner)


def allocate(model: Any, step: int) -> None:
    """Hand out the ranks after optimizer step ``step`` (from 1), while its gradients are still there."""
    tuner = tuner_of(model)
    # Where the ranks are to stay as they are, PEFT would look for the best 0 to drop, and fail.
    if tuner is not None and has_ranks_to_drop(tuner):
        tuner.update_and_allocate(step)


def end(model: Any) -> None:
    """End a stage: saved and loaded, every direction keeps its place."""
    if (tuner := tuner_of(model)) is not None:
        _config(tuner).rank_pattern = None


def penalty(model: Any) -> Tensor | None:
    """Return orth_reg_weight times the mean of || A A^T - I ||_F and || B^T B - I ||_F; None for other adapters."""
    if (tuner := tuner_of(model)) is None:
        return None
    grams = [directions @ directions.T for directions in adalora_directions(tuner)]
    norms = [(gram - torch.eye(len(gram), device=gram.device)).norm() for gram in grams]
    return _config(tuner).orth_reg_weight * torch.stack(norms).mean()


def _config(tuner: AdaLoraModel) -> Any:
    """Return the configuration that the tuner trains by, to be read and written."""
    return tuner.peft_config[adalora_adapter(tuner)]
