"""A frozen network beside the one that is trained: images normalized for the student, renormalized and resized for it."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.data.views import View

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""mean and standard deviation of each color"""


class Frozen(nn.Module):
    """The base of `Teacher` and `Tokenizer`: never trained, always in evaluation mode.

    Args:
        view: its `mean` and `std` are those of the images that come in.
        normalization: mean and standard deviation that the network wants; those of the view if left out.
        size: side in pixels to which images are resized; null leaves them as they are.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, view: View, normalization: Normalization | None = None, size: int | None = None) -> None:
        super().__init__()
        self.size = size
        wanted = normalization or (view.mean, view.std)
        view_mean, view_std, mean, std = (torch.tensor(v).view(3, 1, 1) for v in (view.mean, view.std, *wanted))
        # (x * view_std + view_mean - mean) / std
        self.register_buffer("scale", view_std / std, persistent=False)
        self.register_buffer("shift", (view_mean - mean) / std, persistent=False)

    def train(self, mode: bool = True) -> "Frozen":
        """Stays in evaluation mode."""
        return super().train(False)

    def own_images(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 rows columns"]:
        """The images as the network wants them."""
        if self.size is not None and x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        return x * self.scale + self.shift
