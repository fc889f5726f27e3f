"""Rotation prediction (RotNet): rotate an image by a multiple of 90 degrees and classify by which one.

To recognize the rotation, the network must know which way up objects are, and therefore what they are. There is no
second network and no pair of views, only a classifier with four classes.

Gidaris, Singh and Komodakis, 2018, "Unsupervised representation learning by predicting image rotations"
(arXiv:1803.07728), sections 2.1 and 2.2; equations 2 and 3 are the loss. All four rotations of an image are in one batch
(section 3.1).

What differs from the paper:
- The authors trained AlexNet and NIN; the defaults are those of OpenMMLab for ResNet-50, with random resized crops,
  batch norm over all processes and one linear layer on the pooled features.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.methods.base import Method
from sslbook.nn import backbone_dim
from sslbook.schedules import Clock

VIEW = View(crop=(0.08, 1.0))


def rotate(x: Float[Tensor, "batch channels side side"]) -> Float[Tensor, "4*batch channels side side"]:
    """All four rotations: first the images as they are, then all by 90, 180 and 270 degrees counterclockwise."""
    rotated = [torch.rot90(x, k, dims=(2, 3)) for k in range(4)]
    return rearrange(rotated, "rotation batch c h w -> (rotation batch) c h w")


def targets(batch_size: int, device: torch.device) -> Int[Tensor, "4*{batch_size}"]:
    """The class of each row of `rotate`: 0 to 3 for 0, 90, 180 and 270 degrees."""
    return torch.arange(4, device=device).repeat_interleave(batch_size)


class Rotation(Method):
    """Rotation prediction (RotNet, arXiv:1803.07728).

    Args:
        backbone: the network to train.
        view: augmentation of an image before it is rotated.
    """

    def __init__(self, backbone: nn.Module, view: View = VIEW) -> None:
        super().__init__()
        self.view = view
        self.backbone = backbone
        self.head = nn.Linear(backbone_dim(backbone), 4)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (x,) = batch.views
        y = targets(len(x), x.device)  # the labels are free: we rotated the images ourselves
        logits = self.head(self.backbone(rotate(x))).float()  # (4 batch, 4)
        loss = F.cross_entropy(logits, y)  # equations 2 and 3: the mean over images and rotations
        accuracy = 100 * (logits.argmax(dim=1) == y).float().mean()
        return {"loss": loss, "rotation_accuracy": accuracy}
