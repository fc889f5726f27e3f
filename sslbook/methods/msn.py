"""MSN: match the soft prototype assignment of an image with dropped patches to the EMA teacher's for the whole image.

The teacher assigns a whole view softly to a few learned prototypes. The student sees other views of the image, one with
patches dropped and several small crops, and must reach the same assignment. Sharpened targets prevent the uniform
assignment; the mean-entropy term, and Sinkhorn on the targets, prevent one prototype for all images.

Assran, Caron, Misra, Bojanowski, Bordes, Vincent, Joulin, Rabbat and Ballas, 2022, "Masked siamese networks for
label-efficient learning" (arXiv:2204.07141), section 3, equation 1. The defaults are those of the authors' code
(facebookresearch/msn). As there, the mean-entropy term carries the constant log K, so that it is zero where all
prototypes are equally frequent, and the EMA momentum rises four fifths of the way to 1.

What differs from the authors' code (facebookresearch/msn, db0d572):
- Which patches are dropped is random for each image and epoch, instead of the same for a whole batch.
- Sinkhorn-Knopp is computed with logarithms.
- Linear layers start from Xavier's distribution (the head's from torch's default), the authors' from a truncated normal
  of 0.02.
- The engine clips the prototypes' gradient with the rest; the authors leave it as it is.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch
from sslbook.data.views import MOCO_V2, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import EMA, VisionTransformer
from sslbook.nn.mask_tokens import gather_tokens
from sslbook.nn.precision import full_precision
from sslbook.nn.sinkhorn import sinkhorn
from sslbook.nn.vit import patch_grid, require_transformer
from sslbook.schedules import Clock, Linear
from sslbook.types import PositiveFloat, PositiveInt

LARGE = replace(MOCO_V2, crop=(0.3, 1.0))
FOCAL = replace(MOCO_V2, size=96, crop=(0.05, 0.3))


def sharpen(log_p: Float[Tensor, "n prototypes"], temperature: float) -> Float[Tensor, "n prototypes"]:
    """Log-probabilities of p to the power 1 / temperature, normalized again (section 3, "Sharpening")."""
    return (log_p / temperature).log_softmax(dim=1)


def assignment_loss(
    log_p: Float[Tensor, "anchors n prototypes"], target: Float[Tensor, "n prototypes"]
) -> Float[Tensor, ""]:
    """First term of equation 1: the cross-entropy of every anchor's assignment with its target."""
    return -(target * log_p).sum(dim=-1).mean()


def mean_entropy_loss(log_p: Float[Tensor, "anchors n prototypes"]) -> Float[Tensor, ""]:
    """Second term of equation 1: log K minus the entropy of the mean assignment of all processes' anchors."""
    mean = distributed.all_reduce_sum_with_grad(log_p.exp().mean(dim=(0, 1))) / distributed.world_size()
    return math.log(log_p.shape[-1]) - torch.special.entr(mean).sum()


class Head(nn.Sequential):
    """Three linear layers, with batch norm and GELU after the first two."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int) -> None:
        modules: list[nn.Module] = []
        for dim in (in_dim, hidden_dim):
            modules += [nn.Linear(dim, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.GELU()]
        super().__init__(*modules, nn.Linear(hidden_dim, out_dim))


class MSN(Method):
    """Masked siamese networks (arXiv:2204.07141).

    Args:
        backbone: the vision transformer to train.
        large: a large view: one for the teacher, and the anchors whose patches are dropped.
        focal: a small crop, which is an anchor too.
        num_large: number of large anchors.
        num_focal: number of small crops, at least one if there are no large anchors.
        patch_drop: fraction of a large anchor's patches that is dropped.
        hidden_dim: hidden width of the head.
        output_dim: width of the head's output and of the prototypes.
        num_prototypes: number of prototypes.
        temperature: divides the cosines to the prototypes.
        sharpening: temperature by which the targets are sharpened.
        sinkhorn_targets: balance the targets over the prototypes (three iterations of Sinkhorn-Knopp).
        mean_entropy_weight: weight of the mean-entropy term.
        momentum: EMA momentum of the teacher at the start; rises linearly, four fifths of the way to 1.

    Raises:
        UserError: the backbone is no vision transformer, a crop is no grid of patches, or no patches would be left.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        large: View = LARGE,
        focal: View = FOCAL,
        num_large: int = 1,
        num_focal: int = 10,
        patch_drop: float = 0.15,
        hidden_dim: PositiveInt = 2048,
        output_dim: PositiveInt = 256,
        num_prototypes: PositiveInt = 1024,
        temperature: PositiveFloat = 0.1,
        sharpening: PositiveFloat = 0.25,
        sinkhorn_targets: bool = True,
        mean_entropy_weight: float = 1.0,
        momentum: float = 0.996,
    ) -> None:
        super().__init__()
        backbone = require_transformer(backbone, "MSN", drops_patches=True)
        self.crops = (large, *[large] * num_large, *[focal] * num_focal)
        for view in self.crops:
            patch_grid(view.size, view.size, backbone.patch_size)  # raises if a crop is no grid of patches
        patches = math.prod(patch_grid(large.size, large.size, backbone.patch_size))
        self.num_kept = int(patches * (1 - patch_drop) + 1e-6)
        if not 1 <= self.num_kept <= patches:
            raise UserError(
                f"patch_drop {patch_drop} leaves none of {patches} patches: use {1 - 1 / patches:.3g} or less"
            )
        self.num_large, self.temperature, self.sharpening = num_large, temperature, sharpening
        self.sinkhorn_targets, self.mean_entropy_weight = sinkhorn_targets, mean_entropy_weight
        self.momentum = momentum
        self.backbone = backbone
        self.head = Head(backbone.dim, hidden_dim, output_dim)
        bound = output_dim**-0.5
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, output_dim).uniform_(-bound, bound))
        self.teacher_backbone, self.teacher_head = EMA(self.backbone), EMA(self.head)

    def views(self) -> tuple[View, ...]:
        return self.crops

    def drop_patches(
        self, tokens: Float[Tensor, "n patches dim"], index: Int[Tensor, "n"], clock: Clock, anchor: int
    ) -> Float[Tensor, "n kept dim"]:
        """The kept patches of a large anchor, in random order."""
        order = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD + anchor, tokens.shape[1]).argsort(dim=1)
        return gather_tokens(tokens, order[:, : self.num_kept])

    def pool(self, tokens: Float[Tensor, "n tokens dim"]) -> Float[Tensor, "n dim"]:
        """The image's feature, pooled from the tokens as the backbone does for whole images."""
        return tokens[:, 0] if self.backbone.pool == "cls" else tokens[:, 1:].mean(dim=1)

    def log_assignments(self, z: Float[Tensor, "n dim"]) -> Float[Tensor, "n prototypes"]:
        """Log-probabilities of the soft assignments to the prototypes."""
        cosine = F.normalize(z.float(), dim=1) @ F.normalize(self.prototypes, dim=1).T
        return (cosine / self.temperature).log_softmax(dim=1)

    @torch.no_grad()
    def teacher_targets(self, images: Float[Tensor, "n channels height width"]) -> Float[Tensor, "n prototypes"]:
        """The teacher's sharpened assignments of whole views."""
        z = self.teacher_head(self.teacher_backbone(images))
        with full_precision(z):
            target = sharpen(self.log_assignments(z), self.sharpening)
            return sinkhorn(target, 1.0) if self.sinkhorn_targets else target.exp()

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        n, (whole, *anchors) = len(batch.index), batch.views
        target = self.teacher_targets(whole)  # p+ of equation 1, without gradient, (n, prototypes)
        large, focal = anchors[: self.num_large], anchors[self.num_large :]
        features = []
        if large:
            # Only the kept patches go through the transformer, so dropped ones cost nothing.
            tokens = [self.drop_patches(self.backbone.embed(x), batch.index, clock, i) for i, x in enumerate(large)]
            features.append(self.pool(self.backbone.encode(torch.cat(tokens))))
        if focal:
            features.append(self.backbone(torch.cat(focal)))
        z = torch.cat([self.head(x) for x in features])  # one call per size: batch norm sees each by itself
        with full_precision(z):
            log_p = rearrange(self.log_assignments(z), "(anchor n) k -> anchor n k", n=n)
            assignment, mean_entropy = assignment_loss(log_p, target), mean_entropy_loss(log_p)
            loss = assignment + self.mean_entropy_weight * mean_entropy  # equation 1
            mean_target = distributed.all_reduce_mean(target.mean(dim=0))
        return {
            "loss": loss,
            "assignment": assignment.detach(),
            "mean_entropy": mean_entropy.detach(),
            "target_entropy": torch.special.entr(target).sum(dim=1).mean(),
            "marginal_entropy": torch.special.entr(mean_target).sum(),  # 0: collapse to one prototype
        }

    def after_step(self, clock: Clock) -> None:
        momentum = Linear(self.momentum, 1 - 0.2 * (1 - self.momentum))(clock)
        self.teacher_backbone.update(self.backbone, momentum)
        self.teacher_head.update(self.head, momentum)
