"""Exemplar networks: each of some thousand images is a class, whose members are its own distortions.

The network learns to tell from any distortion of an image which image it was, by an ordinary classifier with a weight
vector per image. What a distortion leaves unchanged is what it must find. With NPID the image's last feature takes
the place of the weights, so that millions of classes become possible; this is the supervised side of the same idea.

Dosovitskiy, Springenberg, Riedmiller and Brox, 2014, "Discriminative unsupervised feature learning with convolutional
neural networks" (arXiv:1406.6909), equations 1 to 3, sections 2.1 and 2.2. What differs:

- The paper cuts its exemplars, 32 pixels wide, from places of strong gradient, and draws 100 distortions of each in
  advance; here whole images are exemplars, and every epoch draws a new distortion, which it shows several times if it
  has more steps than there are exemplars.
- Distortions are a `View`: crop, flip and color; the paper also turns by up to 20 degrees and changes contrast along
  principal components of colors. The surrogate classes start all at once, not a few at a time.
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
    """Equations 1 and 2: cross-entropy of the exemplars' numbers; an image of class -1 does not count.

    The mean is over the images of all processes that count.
    """
    counted = (label >= 0).float()
    each = F.cross_entropy(logits, label.clamp(min=0), reduction="none")
    return (each * counted).sum() / distributed.all_reduce_mean(counted.sum()).clamp(min=1 / distributed.world_size())


class Exemplar(Method):
    """Exemplar convolutional networks (arXiv:1406.6909).

    Args:
        backbone: the network to train.
        view: the distortion of an image.
        num_exemplars: so many images, chosen at random, are the classes; 0 for all.
    """

    def __init__(self, backbone: nn.Module, view: View = VIEW, num_exemplars: int = 32000) -> None:
        super().__init__()
        self.view, self.num_exemplars = view, num_exemplars
        self.backbone = backbone
        self.classifier = nn.Linear(backbone_dim(backbone), max(1, num_exemplars))
        self.register_buffer("label", torch.empty(0, dtype=torch.int64))

    label: Tensor

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def setup(self, data: Data) -> None:
        images = data.num_train
        count = self.num_exemplars or images
        if count > images:
            raise UserError(f"{count} exemplars of {images} images: set --method.num_exemplars to {images} or 0")
        if self.num_exemplars == 0:  # only now it is known how many classes that makes
            self.classifier = nn.Linear(self.classifier.in_features, count, device=self.classifier.weight.device)
        label = torch.full((images,), -1)
        label[rng.permutation(0, 0, images)[:count].sort().values] = torch.arange(count)
        self.label = label.to(self.label.device)

    def sample_order(self, data: Data, clock: Clock) -> Int[Tensor, "images"] | None:
        """The exemplars alone: again and again, every time in another order, until the epoch is full."""
        exemplars = (self.label.cpu() >= 0).nonzero()[:, 0]
        rounds = -(-len(self.label) // len(exemplars))
        orders = [rng.permutation(clock.seed + 100003 * i, clock.epoch, len(exemplars)) for i in range(rounds)]
        return exemplars[torch.cat(orders)][: len(self.label)]

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        label = self.label[batch.index]
        logits = self.classifier(self.backbone(batch.views[0])).float()
        accuracy = 100 * (logits.argmax(dim=1) == label).float().mean()
        return {"loss": surrogate_loss(logits, label), "exemplar_accuracy": accuracy}
