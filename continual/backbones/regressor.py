"""An MLP of frozen random weights for regression: an adapter is all that learns.

h_0 = x,  h_l = GELU(W_l h_{l-1} + b_l),  y = w h_L + b
"""

import math

import torch
from torch import Tensor, nn

from continual.backbones.base import Backbone


class MLPRegressor(Backbone):
    """Random layers of equal width and a linear head, the same ones for the same seed."""

    kind = "regressor"

    def __init__(self, num_inputs: int = 10, hidden_size: int = 64, num_layers: int = 4, seed: int = 0) -> None:
        """Keeps its arguments.

        Args:
            num_inputs: features of a row.
            hidden_size: width of each layer.
            num_layers: hidden layers, each an adapter's layer of its own; the head comes on top.
            seed: of the weights; torch's own generator stays where it was.
        """
        self.num_inputs = num_inputs
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.seed = seed

    @property
    def name(self) -> str:
        """The model's name in reports: its depth and width."""
        return f"MLP-{self.num_layers}x{self.hidden_size}"

    def build(self) -> "MLP":
        """Returns the module in evaluation mode, its weights frozen."""
        generator = torch.Generator().manual_seed(self.seed)
        with torch.random.fork_rng(devices=[]):  # nn.Linear draws its first weights from torch's own generator
            module = MLP(self.num_inputs, self.hidden_size, self.num_layers)
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                _fill(linear, generator)
        return module.requires_grad_(False).eval()


class MLP(nn.Module):
    """The regressor's module. PEFT targets `layers.N.linear` (suffix `linear`) and `head`."""

    def __init__(self, num_inputs: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        widths = [num_inputs] + [hidden_size] * num_layers
        self.layers = nn.ModuleList(MLPLayer(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.head = nn.Linear(hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Predicts one value a row: (B, num_inputs) to (B,)."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x).squeeze(-1)


class MLPLayer(nn.Module):
    """One hidden layer: (B, width in) to (B, width out)."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_inputs, num_outputs)
        self.activation = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        """Applies the linear map and the activation."""
        return self.activation(self.linear(x))


@torch.no_grad()
def _fill(linear: nn.Linear, generator: torch.Generator) -> None:
    """Draws weights that keep a row's scale through depth (He et al., 2015), and biases that spread the kinks."""
    linear.weight.normal_(0.0, math.sqrt(2.0 / linear.in_features), generator=generator)
    linear.bias.normal_(0.0, 0.5, generator=generator)
