"""DINO: self-distillation in which the student matches the EMA teacher's output distribution over multi-crop views.

The teacher sees two global crops and maps each to a distribution over many outputs. The student sees local crops as
well, and predicts from each crop the teacher's distribution for another one: the whole from a part. Two opposite
operations on the teacher's scores prevent collapse: centering (no output dominates over all images) and sharpening (the
distribution of each image has a peak).

Caron, Touvron, Misra, Jégou, Mairal, Bojanowski and Joulin, 2021, "Emerging properties in self-supervised vision
transformers" (arXiv:2104.14294), equations 1 to 4, algorithm 1. The defaults are those of the authors' code
(facebookresearch/dino), where the scores of a batch are centered by the mean of the batches before it.

What differs from the authors' code (facebookresearch/dino, cc72fe9):
- The teacher's temperature rises with every step instead of every epoch. It reaches its final value when the warm-up's
  last epoch ends; in the authors' code that epoch already has it, one epoch earlier.
- The teacher's EMA momentum counts the step just taken, so that it reaches 1 at the last one.
- The engine clips the norm of the whole gradient; the authors clip that of every parameter tensor.
- A transformer's linear layers start from Xavier's distribution; the authors' from a truncated normal of 0.02.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.views import BYOL_1, BYOL_2, View
from sslbook.methods.base import Method
from sslbook.nn import EMA, DINOHead, backbone_dim
from sslbook.nn.backbones import TokenBackbone
from sslbook.nn.precision import full_precision
from sslbook.nn.vit import patch_grid
from sslbook.schedules import Clock, Cosine, Duration, Linear, in_steps
from sslbook.types import PositiveFloat, PositiveInt

GLOBAL_1 = replace(BYOL_1, crop=(0.4, 1.0))
GLOBAL_2 = replace(BYOL_2, crop=(0.4, 1.0))
LOCAL = replace(BYOL_1, size=96, crop=(0.05, 0.4), blur=0.5)


def teacher_distribution(
    scores: Float[Tensor, "*batch outputs"], center: Float[Tensor, "outputs"], temperature: float
) -> Float[Tensor, "*batch outputs"]:
    """Equation 1 for the teacher, centered and sharpened."""
    return ((scores - center) / temperature).softmax(dim=-1)


def dino_loss(
    student: Float[Tensor, "crops n outputs"], teacher: Float[Tensor, "globals n outputs"], temperature: float
) -> Float[Tensor, ""]:
    """Equation 3 as a mean: cross-entropy of the student's distribution for a crop and the teacher's for another.

    Args:
        student: scores of all crops; the global ones come first.
        teacher: distributions of the global crops.
        temperature: divides the student's scores.
    """
    log_p = (student / temperature).log_softmax(dim=-1)
    terms = [
        -(target * log_p[j]).sum(dim=-1).mean() for i, target in enumerate(teacher) for j in range(len(log_p)) if i != j
    ]
    return torch.stack(terms).mean()


def entropy(p: Float[Tensor, "*batch outputs"]) -> Float[Tensor, "*batch"]:
    """In nats: 0 for a one-hot distribution, the logarithm of the number of outputs for the uniform one."""
    return torch.special.entr(p).sum(dim=-1)


class DINO(Method):
    """Self-distillation with no labels (arXiv:2104.14294).

    Args:
        backbone: the network to train; a transformer must be able to resize its positions to both crop sizes.
        global_1: the first global crop.
        global_2: the second global crop.
        local: a local crop, which only the student sees.
        num_local: number of local crops.
        hidden_dim: hidden width of the head.
        bottleneck_dim: width of the head before its last layer.
        num_outputs: width of the head's output.
        head_batch_norm: batch norm in the head's hidden layers.
        student_temperature: divides the student's scores.
        teacher_temperature: divides the teacher's scores; smaller than the student's, which sharpens.
        teacher_temperature_start: the teacher's temperature at the beginning.
        teacher_temperature_warmup: duration of the change from the start to the final temperature.
        center_momentum: EMA momentum of the center; with 1 it stays at zero.
        momentum: EMA momentum of the teacher at the start; rises to 1 along a cosine.
        freeze_last_layer: duration at the beginning in which the head's last layer is frozen.
    """

    center: Tensor
    score_sum: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        global_1: View = GLOBAL_1,
        global_2: View = GLOBAL_2,
        local: View = LOCAL,
        num_local: int = 8,
        hidden_dim: PositiveInt = 2048,
        bottleneck_dim: PositiveInt = 256,
        num_outputs: PositiveInt = 65536,
        head_batch_norm: bool = False,
        student_temperature: PositiveFloat = 0.1,
        teacher_temperature: PositiveFloat = 0.07,
        teacher_temperature_start: PositiveFloat = 0.04,
        teacher_temperature_warmup: Duration = 30,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        freeze_last_layer: Duration = 1,
    ) -> None:
        super().__init__()
        self.crops = (global_1, global_2, *[local] * num_local)
        if isinstance(backbone, TokenBackbone):
            for view in self.crops:
                patch_grid(view.size, view.size, backbone.patch_size)  # raises if a crop is no grid of patches
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.teacher_temperature_start = teacher_temperature_start
        self.teacher_temperature_warmup = teacher_temperature_warmup
        self.center_momentum, self.momentum, self.freeze_last_layer = center_momentum, momentum, freeze_last_layer
        self.backbone = backbone
        self.head = DINOHead(backbone_dim(backbone), hidden_dim, bottleneck_dim, num_outputs, 3, head_batch_norm)
        self.teacher_backbone, self.teacher_head = EMA(self.backbone), EMA(self.head)
        self.register_buffer("center", torch.zeros(num_outputs))
        # The batch's mean scores until the step is taken, summed over the parts of an accumulated batch.
        self.register_buffer("score_sum", torch.zeros(num_outputs), persistent=False)
        self.num_parts = 0

    def views(self) -> tuple[View, ...]:
        return self.crops

    def current_teacher_temperature(self, clock: Clock) -> float:
        """The teacher's temperature at this step."""
        end = in_steps(self.teacher_temperature_warmup, clock.total_steps, clock.steps_per_epoch)
        return Linear(self.teacher_temperature_start, self.teacher_temperature).value(clock, 0, end)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        n, globals_ = len(batch.index), torch.cat(batch.views[:2])  # (2 n, 3, height, width)
        # Crops of one size go through together, so that batch norm sees all of them, as in the authors' code.
        features = [self.backbone(globals_)]
        if len(batch.views) > 2:
            features.append(self.backbone(torch.cat(batch.views[2:])))
        student = self.head(torch.cat(features)).unflatten(0, (len(batch.views), n))  # (crops, n, outputs)
        # The teacher sees the global crops only. EMA modules compute no gradient.
        scores = self.teacher_head(self.teacher_backbone(globals_)).unflatten(0, (2, n))
        with full_precision(scores):
            teacher = teacher_distribution(scores, self.center, self.current_teacher_temperature(clock))
            loss = dino_loss(student, teacher, self.student_temperature)
            if self.training:  # equation 4 needs the mean scores; the center itself moves after the step
                self.score_sum += distributed.all_reduce_mean(scores.mean(dim=(0, 1)))
                self.num_parts += 1
            mean_distribution = distributed.all_reduce_mean(teacher.mean(dim=(0, 1)))
        return {
            "loss": loss,
            "teacher_entropy": entropy(teacher).mean(),
            "marginal_entropy": entropy(mean_distribution),  # 0: collapse to one output
        }

    def before_optimizer_step(self, clock: Clock) -> None:
        # As in the authors' code: no gradient at all. With one of zero, Adam's second moment would start at zero, and
        # the layer's first steps after the freeze would be several times too large.
        if clock.step < in_steps(self.freeze_last_layer, clock.total_steps, clock.steps_per_epoch):
            self.head.prototypes.grad = None

    def after_step(self, clock: Clock) -> None:
        if self.num_parts:
            self.center.lerp_(self.score_sum / self.num_parts, 1 - self.center_momentum)  # equation 4
            self.score_sum.zero_()
            self.num_parts = 0
        momentum = Cosine(self.momentum, 1.0)(clock)
        self.teacher_backbone.update(self.backbone, momentum)
        self.teacher_head.update(self.head, momentum)
