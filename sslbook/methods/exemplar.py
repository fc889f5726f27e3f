"""Exemplar networks: each of some thousand images is a class, whose members are augmentations of that image.

The network classifies any augmentation of an image as that image, by an ordinary linear classifier with a weight vector
per image. Its features must ignore what the augmentation changes. In NPID a memory bank replaces the classifier's
weights, which makes millions of classes possible.

Dosovitskiy, Springenberg, Riedmiller and Brox, 2014, "Discriminative unsupervised feature learning with convolutional
neural networks" (arXiv:1406.6909), equations 1 to 3, sections 2.1 and 2.2.

What differs from the paper:
- The paper's exemplars are patches of 32 pixels at positions with a strong gradient, and 100 augmentations of each are
  made in advance. Here whole images are exemplars, and every epoch makes new augmentations; an exemplar occurs several
  times in an epoch that has more steps than there are exemplars.
- Augmentations are a `View`: crop, flip and color. The paper also rotates by up to 20 degrees and scales the principal
  components of colors. The surrogate classes are all present from the start, instead of a few at a time.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import backbone_dim
from sslbook.schedules import Clock

VIEW = View(crop=(0.25, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_p=1.0, grayscale=0.2)


def surrogate_loss(logits: Float[Tensor, "n classes"], label: Int[Tensor, "n"]) -> Float[Tensor, ""]:
    """Equations 1 and 2: cross-entropy of the surrogate classes; images with the label -1 are ignored.

    The mean is over the images of all processes that have a class.
    """
    counted = (label >= 0).float()
    each = F.cross_entropy(logits, label.clamp(min=0), reduction="none")
    return (each * counted).sum() / distributed.all_reduce_mean(counted.sum()).clamp(min=1 / distributed.world_size())


class Exemplar(Method):
    """Exemplar convolutional networks (arXiv:1406.6909).

    Args:
        backbone: the network to train.
        view: augmentation of an image.
        num_exemplars: images chosen at random as classes; 0 for all.

    Raises:
        UserError: in `setup`, if there are fewer images than exemplars.
    """

    label: Tensor

    def __init__(self, backbone: nn.Module, view: View = VIEW, num_exemplars: int = 32000) -> None:
        super().__init__()
        self.view, self.num_exemplars = view, num_exemplars
        self.backbone = backbone
        self.classifier = nn.Linear(backbone_dim(backbone), max(1, num_exemplars))
        self.register_buffer("label", torch.empty(0, dtype=torch.int64))

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def setup(self, data: Data) -> None:
        """Choose the exemplars; UserError if there are fewer images."""
        num_images = data.num_train
        count = self.num_exemplars or num_images
        if count > num_images:
            raise UserError(f"{count} exemplars of {num_images} images: set num_exemplars to {num_images} or 0")
        if self.num_exemplars == 0:  # only now the number of classes is known
            self.classifier = nn.Linear(self.classifier.in_features, count, device=self.classifier.weight.device)
        label = torch.full((num_images,), -1)
        label[rng.permutation(0, 0, num_images)[:count].sort().values] = torch.arange(count)
        self.label = label.to(self.label.device)

    def sample_order(self, data: Data, clock: Clock) -> Int[Tensor, "images"] | None:
        """Exemplars only: all of them in a random order, then all in another one, until the epoch is full."""
        exemplars = (self.label.cpu() >= 0).nonzero()[:, 0]
        rounds = -(-len(self.label) // len(exemplars))
        orders = [rng.permutation(clock.seed + 100003 * i, clock.epoch, len(exemplars)) for i in range(rounds)]
        return exemplars[torch.cat(orders)][: len(self.label)]

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (x,) = batch.views  # one random transformation T of each exemplar (section 2.1)
        label = self.label[batch.index]  # the surrogate class i is the image itself
        logits = self.classifier(self.backbone(x)).float()  # f(T x) of equation 2, (n, exemplars)
        accuracy = 100 * (logits.argmax(dim=1) == label).float().mean()
        return {"loss": surrogate_loss(logits, label), "exemplar_accuracy": accuracy}
