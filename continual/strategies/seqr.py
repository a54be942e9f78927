"""SEQR: a library of one LoRA a stage; each token takes, layer by layer, the one whose update is largest.

Fleshman & Van Durme 2025, 'SEQR: Secure and Efficient QR-based LoRA Routing', arXiv 2509.18093. All stages share one
frozen random A; stage i trains a B_i of its own. With the thin QR decomposition B_i = Q_i R_i,

    argmax_i || B_i A h || = argmax_i || R_i A h ||                Q_i has orthonormal columns

so that the choice is exact at the cost of an r x r product for each stage. No router is trained and no task is named.
Norms of different stages are made comparable, (|| R_i A h || - mean_i) / std_i, with the mean and the standard
deviation over the tokens of the stage's own training rows (the paper calibrates by z-scores too; the choice of these
tokens is ours).

Shapes: N stages, r rank, k = min(r, d_out), `...` the axes before the last of the layer's input.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from continual.compat.peft import lora_pair
from continual.runtime.parameters import evaluating, load_tensors, save_tensors
from continual.strategies.base import Strategy, require_at_least
from continual.strategies.plain_lora import check_plain_lora, lora_layers, lora_weights

if TYPE_CHECKING:
    from continual.data.stage_data import StageData
    from continual.interfaces import AdaptedModule

_PAIR = "default"


@dataclass
class Library:
    """One layer's updates, (N, d_out, r), the R factors to choose by, (N, k, r), and their norms' scale, (N,) each."""

    B: Tensor
    R: Tensor
    mean: Tensor
    std: Tensor

    def choose(self, u: Tensor) -> Tensor:
        """Return, for the low-rank states ``u`` = A h, (..., r), the index of the stage to take, (...)."""
        norms = torch.einsum("...r,nkr->...nk", u.float(), self.R).norm(dim=-1)
        return ((norms - self.mean) / self.std).argmax(dim=-1)

    def update(self, u: Tensor) -> Tensor:
        """Return B_i u, (..., d_out), of the stage i chosen for each state."""
        chosen = F.one_hot(self.choose(u), len(self.B)).to(u.dtype)
        spread = (chosen.unsqueeze(-1) * u.unsqueeze(-2)).flatten(-2)  # u in the chosen stage's place, 0 elsewhere
        return spread @ self.B.to(u.dtype).transpose(1, 2).flatten(0, 1)

    def to(self, device: torch.device) -> Library:
        """Return the library on a device."""
        return Library(*(tensor.to(device) for tensor in vars(self).values()))

    def add(self, B: Tensor, R: Tensor, norms: Tensor | None) -> Library:
        """Return the library with one more stage; ``norms`` are those of its own tokens, None for no calibration."""
        mean, std = (0.0, 1.0) if norms is None else (norms.mean().item(), norms.std().clamp_min(1e-8).item())
        new = (B, R, torch.tensor(mean), torch.tensor(std))
        together = zip(vars(self).values(), new, strict=True)
        return Library(*(torch.cat([old.cpu(), one.detach().float().cpu().unsqueeze(0)]) for old, one in together))


class SEQR(Strategy):
    """Trains one B a stage on a frozen A and routes by norms when scoring (see the module's docstring).

    The adapter's folder of each stage is that stage's own LoRA, for PEFT to load; the library is kept by the strategy.

    Stores: 4 r (d_out + min(r, d_out)) + 8 bytes a stage and adapted projection.

    Args:
        calibrate: Make the norms of different stages comparable; otherwise the largest norm as it is.
        calibration_rows: Training rows of a stage that the scale of its norms is taken from, at least 1.
    """

    def __init__(self, calibrate: bool = True, calibration_rows: int = 64) -> None:
        require_at_least(1, calibration_rows=calibration_rows)
        self.calibrate, self.calibration_rows = calibrate, calibration_rows
        self.libraries: dict[str, Library] = {}
        self._handles: list[RemovableHandle] = []

    def check(self, module: AdaptedModule, stages: Sequence[StageData]) -> None:
        """Raise ConfigError for any adapter but plain LoRA on linear layers."""
        check_plain_lora(module, "SEQR")

    def prepare(self, module: AdaptedModule) -> None:
        """Freeze A for good."""
        for layer in lora_layers(module).values():
            lora_pair(layer, _PAIR)[0].requires_grad_(False)

    def begin_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Train a B that starts at 0, by itself."""
        self._unhook()
        for layer in lora_layers(module).values() if stage > 1 else ():
            nn.init.zeros_(lora_weights(layer, _PAIR)[1])

    def end_stage(self, module: AdaptedModule, data: StageData, stage: int) -> None:
        """Put the stage's B into the library, and let the library answer from here on."""
        states = self._states(module, data) if self.calibrate else {}
        for name, layer in lora_layers(module).items():
            B = lora_weights(layer, _PAIR)[1].detach().float()
            R = torch.linalg.qr(B).R
            norms = F.linear(states[name], R).norm(dim=-1) if self.calibrate else None
            empty = Library(B.new_zeros(0, *B.shape), B.new_zeros(0, *R.shape), B.new_zeros(0), B.new_zeros(0))
            self.libraries[name] = self.libraries.get(name, empty).add(B, R, norms)

    def _states(self, module: AdaptedModule, data: StageData) -> dict[str, Tensor]:
        """Return each layer's low-rank states, (tokens, r), over some of the stage's training rows."""
        states: dict[str, list[Tensor]] = {name: [] for name in lora_layers(module)}

        def keep(name: str, part: nn.Module, inputs: Any, output: Tensor) -> None:
            states[name].append(output.detach().float().flatten(0, -2))

        handles = [
            lora_pair(layer, _PAIR)[0].register_forward_hook(partial(keep, name))
            for name, layer in lora_layers(module).items()
        ]
        rows = data.train_rows
        sample = random.Random(data.seed).sample(rows, min(self.calibration_rows, len(rows)))
        with evaluating(module), torch.no_grad():
            for row in sample:  # one by one: no padding among the tokens
                module.outputs(self.collate(module, [row]))
        for handle in handles:
            handle.remove()
        return {name: torch.cat(parts) for name, parts in states.items()}

    # -- scoring ------------------------------------------------------------------------------------------------------

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Let the library, moved to the device, answer in the place of the last stage's B."""
        self.route(pl_module)  # type: ignore[arg-type]

    def route(self, module: AdaptedModule) -> None:
        """Answer by the library until the next stage begins."""
        self._unhook()
        self.libraries = {name: library.to(module.device) for name, library in self.libraries.items()}
        layers = lora_layers(module)
        self._handles = [
            lora_pair(layers[name], _PAIR)[1].register_forward_hook(partial(_answer, library))
            for name, library in self.libraries.items()
        ]

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def stored_parameters(self, module: AdaptedModule) -> int:
        """Return the numbers of the library and of the shared A."""
        library = sum(tensor.numel() for library in self.libraries.values() for tensor in vars(library).values())
        return library + self._size_A(module)

    def serving_parameters(self, module: AdaptedModule) -> int:
        """Return the numbers that a token is routed by, and those of one stage's B."""
        sizes = [library.B.numel() // len(library.B) - library.B.numel() for library in self.libraries.values()]
        return self.stored_parameters(module) + sum(sizes)

    def _size_A(self, module: AdaptedModule) -> int:
        return sum(lora_weights(layer, _PAIR)[0].numel() for layer in lora_layers(module).values())

    # -- on disk ------------------------------------------------------------------------------------------------------

    def write(self, folder: Path) -> None:
        """Write the library."""
        parts = {f"{name}|{k}": v for name, library in self.libraries.items() for k, v in vars(library).items()}
        save_tensors(folder, parts)

    def read(self, module: AdaptedModule, folder: Path) -> None:
        """Read the library."""
        tensors = load_tensors(folder)
        self.libraries = {
            name: Library(*(tensors[f"{name}|{part}"] for part in ("B", "R", "mean", "std")))
            for name in lora_layers(module)
        }


def _answer(library: Library, part: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return library.update(inputs[0])
