"""iBOT: masked image modeling with the EMA teacher as online tokenizer, plus DINO's self-distillation.

The teacher sees the whole crop and maps every token to a distribution over outputs: a tokenizer that is learned during
training. The student sees the crop with blocks of patches replaced by a mask token, and predicts the teacher's
distribution for each masked patch. The cls tokens are compared between crops as in DINO.

Zhou, Wei, Wang, Shen, Xie, Yuille and Kong, 2022, "iBOT: Image BERT pre-training with online tokenizer"
(arXiv:2111.07832), equations 2 and 3, algorithm 1; the defaults are those of the authors' code (bytedance/ibot), where
the patches' center averages all patches of the teacher, not the masked ones alone. DINOv2 (Oquab et al., 2023,
arXiv:2304.07193, section 4) is the same method with other options, in the recipe `dinov2`: a separate head for patches,
Sinkhorn-Knopp instead of centering, and the KoLeo regularizer.

What differs from the authors' code (bytedance/ibot, da316d8):
- The masked fraction of a crop is a counter-based random number of seed, epoch and image; theirs comes from a running
  generator.
- The scale of the outputs is fixed at 1; iBOT's and DINOv2's authors learn it.
- As in `dino`, the teacher's temperature rises with every step and reaches its final value one epoch later; its EMA
  momentum counts the step just taken; the engine clips the norm of the whole gradient instead of every tensor's (in
  DINOv2's code, of each submodule's); and the backbone's linear layers start from Xavier's distribution instead of a
  truncated normal.
- While the last layers are frozen they get no gradient, as in iBOT's code. DINOv2's code sets their learning rate to
  zero instead, so that AdamW's second moments are estimated when training of these layers begins.
- KoLeo's nearest neighbor is searched in the global batch; DINOv2's code searches among the images of one GPU.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data import masks
from sslbook.data.loader import Batch
from sslbook.data.views import BYOL_1, BYOL_2, View
from sslbook.methods.base import Method
from sslbook.methods.dino import dino_loss, teacher_distribution
from sslbook.nn import EMA, DINOHead, VisionTransformer
from sslbook.nn.precision import full_precision
from sslbook.nn.sinkhorn import sinkhorn
from sslbook.nn.vit import patch_grid, require_transformer
from sslbook.schedules import Clock, Cosine, Duration, Linear, in_steps
from sslbook.types import PositiveFloat, PositiveInt

GLOBAL_1 = replace(BYOL_1, crop=(0.25, 1.0))
GLOBAL_2 = replace(BYOL_2, crop=(0.25, 1.0))
LOCAL = replace(BYOL_1, size=96, crop=(0.05, 0.25), blur=0.5)


def patch_loss(
    student: Float[Tensor, "masked outputs"],
    teacher: Float[Tensor, "masked outputs"],
    mask: Bool[Tensor, "crops patches"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Equation 2: cross-entropy averaged over the masked patches of every crop, then over the crops.

    Args:
        student: scores of the masked patches, in the order of the mask.
        teacher: the teacher's distributions for the same patches.
        mask: true where a patch is masked; a crop without any counts as zero.
        temperature: divides the student's scores.
    """
    weight = (mask / mask.sum(dim=1, keepdim=True).clamp(min=1))[mask]
    log_p = (student / temperature).log_softmax(dim=-1)
    return -((teacher * log_p).sum(dim=-1) * weight).sum() / len(mask)


def koleo(x: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """KoLeo: minus the mean log distance to the nearest other image of the global batch, on the unit sphere.

    Sablayrolles, Douze, Schmid and Jégou, 2019, "Spreading vectors for similarity search" (arXiv:1806.03198), eq. 2.
    """
    z = distributed.all_gather_with_grad(F.normalize(x, dim=1))
    own = distributed.own_rows(len(x), x.device)
    with torch.no_grad():
        cosine = z[own] @ z.T
        nearest = cosine.scatter(1, own[:, None], -2.0).argmax(dim=1)  # not the image itself
    # As in DINOv2's code; the default epsilon of 1e-6 matters where neighbors are close.
    return -(F.pairwise_distance(z[own], z[nearest], eps=1e-8) + 1e-8).log().mean()


class IBOT(Method):
    """Image BERT pre-training with online tokenizer (arXiv:2111.07832), and DINOv2 (arXiv:2304.07193).

    Args:
        backbone: the vision transformer to train.
        global_1: the first global crop.
        global_2: the second global crop.
        local: a local crop, which only the student sees.
        num_local: number of local crops.
        hidden_dim: hidden width of the heads.
        bottleneck_dim: width of the heads before their last layer.
        num_outputs: width of the heads' output.
        separate_heads: give the patches their own head, instead of sharing that of the cls token.
        mask_probability: fraction of the global crops in which patches are masked.
        mask_ratio: range of the fraction of patches that is masked in such a crop.
        min_block: smallest area of a masked block, in patches; null: the square of a third of the grid's side, 16 of
            14 x 14, as in iBOT's code.
        cls_weight: weight of the loss on cls tokens.
        patch_weight: weight of the loss on masked patches.
        koleo_weight: weight of the KoLeo regularizer on the cls tokens of the global crops.
        centering: `center`: subtract an EMA of the scores from the teacher's scores; `sinkhorn`: three iterations of
            Sinkhorn-Knopp, which makes all outputs equally frequent within the batch.
        student_temperature: divides the student's scores.
        teacher_temperature: divides the teacher's scores.
        teacher_temperature_start: the teacher's temperature at the beginning.
        teacher_temperature_warmup: duration of the change from the start to the final temperature.
        center_momentum: EMA momentum of the centers.
        momentum: EMA momentum of the teacher at the start; rises to 1 along a cosine.
        freeze_last_layer: duration at the beginning in which the heads' last layers are frozen.

    Raises:
        UserError: the backbone is no vision transformer, or a crop is no grid of patches.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]
    center: Tensor
    patch_center: Tensor
    score_sums: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        global_1: View = GLOBAL_1,
        global_2: View = GLOBAL_2,
        local: View = LOCAL,
        num_local: int = 10,
        hidden_dim: PositiveInt = 2048,
        bottleneck_dim: PositiveInt = 256,
        num_outputs: PositiveInt = 8192,
        separate_heads: bool = False,
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        min_block: int | None = None,
        cls_weight: float = 1.0,
        patch_weight: float = 1.0,
        koleo_weight: float = 0.0,
        centering: Literal["center", "sinkhorn"] = "center",
        student_temperature: PositiveFloat = 0.1,
        teacher_temperature: PositiveFloat = 0.07,
        teacher_temperature_start: PositiveFloat = 0.04,
        teacher_temperature_warmup: Duration = 30,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        freeze_last_layer: Duration = 1,
    ) -> None:
        super().__init__()
        backbone = require_transformer(backbone, "iBOT")
        self.crops = (global_1, global_2, *[local] * num_local)
        for view in self.crops:
            patch_grid(view.size, view.size, backbone.patch_size)  # raises if a crop is no grid of patches
        self.mask_probability, self.mask_ratio, self.min_block = mask_probability, mask_ratio, min_block
        self.cls_weight, self.patch_weight, self.koleo_weight = cls_weight, patch_weight, koleo_weight
        self.centering, self.center_momentum = centering, center_momentum
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.teacher_temperature_start = teacher_temperature_start
        self.teacher_temperature_warmup = teacher_temperature_warmup
        self.momentum, self.freeze_last_layer = momentum, freeze_last_layer
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.zeros(backbone.dim))
        names = ["cls", "patch"] if separate_heads else ["cls"]
        self.patch_head = names[-1]
        heads = {name: DINOHead(backbone.dim, hidden_dim, bottleneck_dim, num_outputs) for name in names}
        self.heads = nn.ModuleDict(heads)
        self.teacher_backbone, self.teacher_heads = EMA(self.backbone), EMA(self.heads)
        self.register_buffer("center", torch.zeros(num_outputs))
        self.register_buffer("patch_center", torch.zeros(num_outputs))
        # The batch's mean scores until the step is taken, summed over the parts of an accumulated batch.
        self.register_buffer("score_sums", torch.zeros(2, num_outputs), persistent=False)
        self.num_parts = 0

    def views(self) -> tuple[View, ...]:
        return self.crops

    def sample_masks(
        self, index: Int[Tensor, "n"], grid: tuple[int, int], clock: Clock, crop: int
    ) -> Bool[Tensor, "n patches"]:
        """Random block masks of a global crop, in some of the images, each with its own mask ratio."""
        u = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD + crop, 2)
        low, high = self.mask_ratio
        ratio = torch.where(u[:, 0] < self.mask_probability, low + (high - low) * u[:, 1], 0.0)
        num_masked = (ratio * grid[0] * grid[1]).long()
        smallest = (min(grid) // 3) ** 2 if self.min_block is None else self.min_block
        stream = masks.STREAM + 100_000 * crop  # beyond the attempts at the first crop's blocks
        return masks.block_mask(index, grid, num_masked, clock, min_block=smallest, stream=stream)

    def current_teacher_temperature(self, clock: Clock) -> float:
        """The teacher's temperature at this step."""
        end = in_steps(self.teacher_temperature_warmup, clock.total_steps, clock.steps_per_epoch)
        return Linear(self.teacher_temperature_start, self.teacher_temperature).value(clock, 0, end)

    def distributions(
        self, scores: Float[Tensor, "n outputs"], center: Float[Tensor, "outputs"], temperature: float
    ) -> Float[Tensor, "n outputs"]:
        """The teacher's distributions: centered, or balanced by Sinkhorn-Knopp, and sharpened."""
        if self.centering == "sinkhorn":
            return sinkhorn(scores, temperature)
        return teacher_distribution(scores, center, temperature)

    @torch.no_grad()
    def teacher_targets(
        self, images: Float[Tensor, "crops channels height width"], mask: Bool[Tensor, "crops patches"], clock: Clock
    ) -> tuple[Float[Tensor, "crops outputs"], Float[Tensor, "masked outputs"]]:
        """The teacher's distributions for the cls tokens and for the masked patches."""
        network: Any = self.teacher_backbone.module
        heads: Any = self.teacher_heads.module
        tokens = network.encode(network.embed(images))  # of the whole crops
        cls, patches = heads["cls"](tokens[:, 0]), heads[self.patch_head](tokens[:, 1:])
        temperature = self.current_teacher_temperature(clock)
        with full_precision(cls):
            cls_target = self.distributions(cls, self.center, temperature)
            patch_target = self.distributions(patches[mask], self.patch_center, temperature)
            if self.training:  # the centers move after the step
                self.score_sums += distributed.all_reduce_mean(torch.stack([cls.mean(dim=0), patches.mean(dim=(0, 1))]))
                self.num_parts += 1
        return cls_target, patch_target

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        n, globals_ = len(batch.index), torch.cat(batch.views[:2])  # (2 n, 3, height, width)
        grid = patch_grid(globals_.shape[2], globals_.shape[3], self.backbone.patch_size)
        mask = torch.cat([self.sample_masks(batch.index, grid, clock, crop) for crop in (0, 1)])  # (2 n, patches)
        cls_target, patch_target = self.teacher_targets(globals_, mask, clock)  # (2 n, outputs), (masked, outputs)

        # The student sees masked global crops and whole local ones.
        tokens = self.backbone.encode(self.backbone.embed(globals_, mask, self.mask_token))
        cls = [tokens[:, 0]]
        if len(batch.views) > 2:
            cls.append(self.backbone.encode(self.backbone.embed(torch.cat(batch.views[2:])))[:, 0])
        student = rearrange(self.heads["cls"](torch.cat(cls)), "(crop n) k -> crop n k", n=n)
        patch_student = self.heads[self.patch_head](tokens[:, 1:][mask])
        with full_precision(student):
            teacher = rearrange(cls_target, "(crop n) k -> crop n k", n=n)
            cls_loss = dino_loss(student, teacher, self.student_temperature)  # equation 3
            masked_loss = patch_loss(patch_student, patch_target, mask, self.student_temperature)  # equation 2
            loss = self.cls_weight * cls_loss + self.patch_weight * masked_loss
            logged = {"cls_loss": cls_loss.detach(), "patch_loss": masked_loss.detach()}
            if self.koleo_weight:  # DINOv2: for each global crop by itself, before the head
                regularizer = koleo(tokens[:n, 0].float()) + koleo(tokens[n:, 0].float())
                loss = loss + self.koleo_weight * regularizer
                logged["koleo"] = regularizer.detach()
        logged["teacher_entropy"] = torch.special.entr(cls_target).sum(dim=1).mean()
        return {"loss": loss, **logged}

    def before_optimizer_step(self, clock: Clock) -> None:
        # No gradient at all, as in the authors' code: see `sslbook.methods.dino`.
        if clock.step < in_steps(self.freeze_last_layer, clock.total_steps, clock.steps_per_epoch):
            for head in self.heads.values():
                head.prototypes.grad = None  # pyrefly: ignore

    def after_step(self, clock: Clock) -> None:
        if self.num_parts:
            for center, score_sum in zip((self.center, self.patch_center), self.score_sums):
                center.lerp_(score_sum / self.num_parts, 1 - self.center_momentum)
            self.score_sums.zero_()
            self.num_parts = 0
        momentum = Cosine(self.momentum, 1.0)(clock)
        self.teacher_backbone.update(self.backbone, momentum)
        self.teacher_heads.update(self.heads, momentum)
