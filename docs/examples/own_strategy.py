"""Pull back: training stays near the adapter that the stage before left (L2-SP, Li et al. 2018, arXiv 1802.01483)."""

from safetensors.torch import load_file, save_file
from torch.nn.utils import parameters_to_vector

from continual.strategies import Strategy


class PullBack(Strategy):
    def __init__(self, weight: float = 0.1) -> None:
        self.weight, self.anchor = weight, None

    def weights(self, module):
        return parameters_to_vector([p for p in module.parameters() if p.requires_grad])

    def penalty(self, module, batch, outputs):  # each step: what is added to the loss
        if self.anchor is None:  # the first stage
            return None
        return self.weight * (self.weights(module) - self.anchor.to(module.device)).square().sum()

    def end_stage(self, module, data, stage):
        self.anchor = self.weights(module).detach().clone()

    def write(self, folder):  # all that the next stage may know, after a kill too
        save_file({"anchor": self.anchor.cpu()}, folder / "anchor.safetensors")

    def read(self, module, folder):
        self.anchor = load_file(folder / "anchor.safetensors")["anchor"]
