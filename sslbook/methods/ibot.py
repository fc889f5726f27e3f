"""iBOT: the student names hidden patches as the teacher names them, besides whole images.

The teacher, a moving average of the student, sees the whole crop and turns every token into a distribution over
outputs: a tokenizer that is learned along the way. The student sees the crop with blocks of patches replaced by a mask
token and must give each hidden patch the teacher's distribution; the cls tokens are compared between crops as in DINO.

Zhou, Wei, Wang, Shen, Xie, Yuille and Kong, 2022, "iBOT: Image BERT pre-training with online tokenizer"
(arXiv:2111.07832), equations 2 and 3, algorithm 1. DINOv2 (Oquab et al., 2023, arXiv:2304.07193, section 4) is the same
method with other options, in the recipe `dinov2`: heads of their own for patches, Sinkhorn-Knopp instead of centering,
and the KoLeo regularizer, which spreads the features.

What differs from the authors' code: as there, the patches' center averages all patches of the teacher and not the
hidden ones; but how much of a crop is hidden is keyed by image and epoch, a last layer that waits gets a gradient of
zero, and the outputs' scale is 1, which the authors learn. As in `dino`, the teacher's temperature rises with every step
instead of every epoch, its momentum counts the step just taken, the engine clips the norm of the whole gradient instead
of every tensor's, and the backbone's linear layers start by Xavier instead of a truncated normal. In DINOv2's code a
nearest neighbor is sought among the images of one GPU, here among the whole batch, so that the number of processes
changes nothing.
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
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn import EMA, DINOHead, VisionTransformer
from sslbook.nn.sinkhorn import sinkhorn
from sslbook.nn.vit import patch_grid
from sslbook.schedules import Clock, Cosine, Duration, Linear, in_steps

GLOBAL_1 = replace(BYOL_1, crop=(0.25, 1.0))
GLOBAL_2 = replace(BYOL_2, crop=(0.25, 1.0))
LOCAL = replace(BYOL_1, size=96, crop=(0.05, 0.25), blur=0.5)


def cls_loss(
    student: Float[Tensor, "crops n outputs"], teacher: Float[Tensor, "globals n outputs"], temperature: float
) -> Float[Tensor, ""]:
    """Equation 3: cross-entropy of the student's scores of every crop to the teacher's distribution of another."""
    log_p = (student / temperature).log_softmax(dim=-1)
    terms = [
        -(target * log_p[j]).sum(dim=-1).mean() for i, target in enumerate(teacher) for j in range(len(log_p)) if i != j
    ]
    return torch.stack(terms).mean()


def patch_loss(
    student: Float[Tensor, "hidden outputs"],
    teacher: Float[Tensor, "hidden outputs"],
    mask: Bool[Tensor, "crops patches"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Equation 2: cross-entropy averaged over the hidden patches of every crop, then over the crops.

    The rows are the hidden patches in the mask's order; crops without any count as zero.
    """
    weight = (mask / mask.sum(dim=1, keepdim=True).clamp(min=1))[mask]
    log_p = (student / temperature).log_softmax(dim=-1)
    return -((teacher * log_p).sum(dim=-1) * weight).sum() / len(mask)


def koleo(x: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Minus the mean logarithm of the distance to the nearest other image of all processes, on the unit sphere.

    Sablayrolles, Douze, Schmid and Jégou, 2019, "Spreading vectors for similarity search" (arXiv:1806.03198), eq. 2.
    """
    everyone = distributed.all_gather_with_grad(F.normalize(x, dim=1))
    own = distributed.rank() * len(x) + torch.arange(len(x), device=x.device)
    with torch.no_grad():
        cosine = everyone[own] @ everyone.T
        nearest = cosine.scatter(1, own[:, None], -2.0).argmax(dim=1)
    # As in DINOv2's code; the default epsilon of 1e-6 is felt where neighbors are close.
    return -(F.pairwise_distance(everyone[own], everyone[nearest], eps=1e-8) + 1e-8).log().mean()


class IBOT(Method):
    """Image BERT pre-training with online tokenizer (arXiv:2111.07832), and DINOv2 (arXiv:2304.07193).

    Args:
        backbone: the vision transformer to train.
        global_1: the first large crop.
        global_2: the second large crop.
        local: what the small crops are like, which only the student sees.
        num_local: number of small crops.
        hidden_dim: hidden width of the heads.
        bottleneck_dim: width of the heads before their last layer.
        num_outputs: width of the heads' output.
        separate_heads: give the patches a head of their own, instead of that of the cls token.
        mask_probability: part of the large crops in which patches are hidden.
        mask_ratio: range of the part of a crop's patches that is hidden there.
        min_block: the smallest area of a block of hidden patches, in patches; null: the square of a third of the
            grid's side, 16 of 14 x 14, as in iBOT's code.
        cls_weight: weight of the loss on cls tokens.
        patch_weight: weight of the loss on hidden patches.
        koleo_weight: weight of the KoLeo regularizer on the cls tokens of the large crops.
        centering: `center`: subtract a moving average from the teacher's scores; `sinkhorn`: let all outputs be used
            alike within the batch (three rounds of Sinkhorn-Knopp).
        student_temperature: divides the student's scores.
        teacher_temperature: divides the teacher's scores.
        teacher_temperature_start: the teacher's temperature in the beginning.
        teacher_temperature_warmup: duration of the way from the one to the other.
        center_momentum: how much of themselves the centers keep at a step.
        momentum: how much of itself the teacher keeps at a step, in the beginning; rises to 1.
        freeze_last_layer: for how long the heads' last layers stay as they are.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]
    center: Tensor
    patch_center: Tensor
    seen: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        global_1: View = GLOBAL_1,
        global_2: View = GLOBAL_2,
        local: View = LOCAL,
        num_local: int = 10,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_outputs: int = 8192,
        separate_heads: bool = False,
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        min_block: int | None = None,
        cls_weight: float = 1.0,
        patch_weight: float = 1.0,
        koleo_weight: float = 0.0,
        centering: Literal["center", "sinkhorn"] = "center",
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        teacher_temperature_start: float = 0.04,
        teacher_temperature_warmup: Duration = 30,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        freeze_last_layer: Duration = 1,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, VisionTransformer):
            raise UserError(
                f"iBOT hides patches from a vision transformer and cannot use a {type(backbone).__name__}: "
                "choose sslbook.nn.VisionTransformer or sslbook.nn.vit_tiny, vit_small, vit_base, vit_large, vit_huge"
            )
        if not 0 <= mask_ratio[0] <= mask_ratio[1] < 1:
            raise UserError(f"mask ratio {list(mask_ratio)} must be an increasing pair, at least 0 and less than 1")
        self.crops = (global_1, global_2, *[local] * num_local)
        for view in self.crops:
            patch_grid(view.size, view.size, backbone.patch_size)  # refuses crops that cannot be cut into patches
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
        self.heads = nn.ModuleDict(
            {name: DINOHead(backbone.dim, hidden_dim, bottleneck_dim, num_outputs) for name in names}
        )
        self.teacher_backbone, self.teacher_heads = EMA(self.backbone), EMA(self.heads)
        self.register_buffer("center", torch.zeros(num_outputs))
        self.register_buffer("patch_center", torch.zeros(num_outputs))
        # What the two centers move to when the step is taken: a batch may come in several parts.
        self.register_buffer("seen", torch.zeros(2, num_outputs), persistent=False)
        self.parts = 0

    def views(self) -> tuple[View, ...]:
        return self.crops

    def hidden(
        self, index: Int[Tensor, "n"], grid: tuple[int, int], clock: Clock, crop: int
    ) -> Bool[Tensor, "n patches"]:
        """Which patches of a large crop are hidden: blocks, in some of the images, more or fewer of them."""
        u = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD + crop, 2)
        low, high = self.mask_ratio
        ratio = torch.where(u[:, 0] < self.mask_probability, low + (high - low) * u[:, 1], 0.0)
        smallest = (min(grid) // 3) ** 2 if self.min_block is None else self.min_block
        stream = masks.STREAM + 100_000 * crop  # beyond the attempts at the first crop's blocks
        return masks.block_mask(
            index, grid, (ratio * grid[0] * grid[1]).long(), clock, min_block=smallest, stream=stream
        )

    def targets(
        self, scores: Float[Tensor, "n outputs"], center: Float[Tensor, "outputs"], temperature: float
    ) -> Float[Tensor, "n outputs"]:
        """The teacher's distributions: no output wins for all rows, and each row decides."""
        if self.centering == "sinkhorn":
            return sinkhorn(scores, temperature)
        return ((scores - center) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def teach(
        self, images: Float[Tensor, "crops 3 height width"], mask: Bool[Tensor, "crops patches"], clock: Clock
    ) -> tuple[Float[Tensor, "crops outputs"], Float[Tensor, "hidden outputs"]]:
        """The teacher's distributions for the cls tokens and for the hidden patches; notes where the centers go."""
        network: Any = self.teacher_backbone.module
        heads: Any = self.teacher_heads.module
        tokens = network.encode(network.embed(images))
        cls, patches = heads["cls"](tokens[:, 0]), heads["patch" if "patch" in heads else "cls"](tokens[:, 1:])
        end = in_steps(self.teacher_temperature_warmup, clock.total_steps, clock.steps_per_epoch)
        temperature = Linear(self.teacher_temperature_start, self.teacher_temperature).value(clock, 0, end)
        with torch.autocast(cls.device.type, enabled=False):
            answers = (
                self.targets(cls, self.center, temperature),
                self.targets(patches[mask], self.patch_center, temperature),
            )
            if self.training:
                self.seen += distributed.all_reduce_mean(torch.stack([cls.mean(dim=0), patches.mean(dim=(0, 1))]))
                self.parts += 1
        return answers

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        n, globals_ = len(batch.index), torch.cat(batch.views[:2])
        grid = patch_grid(globals_.shape[2], globals_.shape[3], self.backbone.patch_size)
        mask = torch.cat([self.hidden(batch.index, grid, clock, crop) for crop in (0, 1)])
        teacher, patch_teacher = self.teach(globals_, mask, clock)

        tokens = self.backbone.encode(self.backbone.embed(globals_, mask, self.mask_token))
        features = [tokens[:, 0]]
        if len(batch.views) > 2:
            features.append(self.backbone.encode(self.backbone.embed(torch.cat(batch.views[2:])))[:, 0])
        frozen = clock.step < in_steps(self.freeze_last_layer, clock.total_steps, clock.steps_per_epoch)
        patch_head = self.heads["patch" if "patch" in self.heads else "cls"]
        student = rearrange(self.heads["cls"](torch.cat(features), frozen), "(crop n) k -> crop n k", n=n)
        patch_student = patch_head(tokens[:, 1:][mask], frozen)
        with torch.autocast(student.device.type, enabled=False):
            of_cls = cls_loss(student, rearrange(teacher, "(crop n) k -> crop n k", n=n), self.student_temperature)
            of_patches = patch_loss(patch_student, patch_teacher, mask, self.student_temperature)
            loss = self.cls_weight * of_cls + self.patch_weight * of_patches
            logged = {"cls_loss": of_cls.detach(), "patch_loss": of_patches.detach()}
            if self.koleo_weight:
                spreading = koleo(tokens[:n, 0].float()) + koleo(tokens[n:, 0].float())
                loss = loss + self.koleo_weight * spreading
                logged["koleo"] = spreading.detach()
        logged["teacher_entropy"] = torch.special.entr(teacher).sum(dim=1).mean()
        return {"loss": loss, **logged}

    def after_step(self, clock: Clock) -> None:
        if self.parts:
            for center, seen in zip((self.center, self.patch_center), self.seen):
                center.lerp_(seen / self.parts, 1 - self.center_momentum)
            self.seen.zero_()
            self.parts = 0
        momentum = Cosine(self.momentum, 1.0)(clock)
        self.teacher_backbone.update(self.backbone, momentum)
        self.teacher_heads.update(self.heads, momentum)
