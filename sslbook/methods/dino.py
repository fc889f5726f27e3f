"""DINO: a student names each image as its teacher does, with names nobody gave.

The teacher, a moving average of the student, turns two large crops into distributions over a great many outputs. The
student sees small crops as well and must give each the teacher's distribution for another crop: from a part, the whole.
Collapse is prevented by two opposite forces on the teacher's scores alone: centering (no output wins for all images)
and sharpening (each image decides).

Caron, Touvron, Misra, Jégou, Mairal, Bojanowski and Joulin, 2021, "Emerging properties in self-supervised vision
transformers" (arXiv:2104.14294), equations 1 to 4, algorithm 1. As in the authors' code, the scores of a batch are
centered by the mean of the batches before it. What differs from it:

- The teacher's temperature rises with every step instead of every epoch, and the teacher's momentum counts the step
  just taken, so that it reaches 1 at the last one.
- In the first epoch the last layer gets a gradient of zero instead of none. Weight decay then shortens its rows, which
  changes nothing, since they are normalized.
- The engine clips the norm of the whole gradient; the authors clip that of every parameter tensor.
- A transformer's linear layers start by Xavier here, from a truncated normal of 0.02 there.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.views import BYOL_1, BYOL_2, View
from sslbook.methods.base import Method
from sslbook.nn import EMA, DINOHead, VisionTransformer, backbone_dim
from sslbook.nn.vit import patch_grid
from sslbook.schedules import Clock, Cosine, Duration, Linear, in_steps

GLOBAL_1 = replace(BYOL_1, crop=(0.4, 1.0))
GLOBAL_2 = replace(BYOL_2, crop=(0.4, 1.0))
LOCAL = replace(BYOL_1, size=96, crop=(0.05, 0.4), blur=0.5)


def teacher_distribution(
    scores: Float[Tensor, "*batch outputs"], center: Float[Tensor, "outputs"], temperature: float
) -> Float[Tensor, "*batch outputs"]:
    """Equation 1 for the teacher: centered and sharpened."""
    return ((scores - center) / temperature).softmax(dim=-1)


def dino_loss(
    student: Float[Tensor, "crops n outputs"], teacher: Float[Tensor, "globals n outputs"], temperature: float
) -> Float[Tensor, ""]:
    """Equation 3, averaged: the cross-entropy of the student's distribution of every crop to the teacher's of another.

    The first crops are those that the teacher saw; `teacher` holds distributions, `student` scores.
    """
    log_p = (student / temperature).log_softmax(dim=-1)
    terms = [
        -(target * log_p[j]).sum(dim=-1).mean() for i, target in enumerate(teacher) for j in range(len(log_p)) if i != j
    ]
    return torch.stack(terms).mean()


def entropy(p: Float[Tensor, "*batch outputs"]) -> Float[Tensor, "*batch"]:
    """In nats: 0 if one output has everything, the logarithm of their number if all have the same."""
    return torch.special.entr(p).sum(dim=-1)


class DINO(Method):
    """Self-distillation with no labels (arXiv:2104.14294).

    Args:
        backbone: the network to train; with crops of two sizes a transformer resamples its positions.
        global_1: the first large crop.
        global_2: the second large crop.
        local: what the small crops are like, which only the student sees.
        num_local: number of small crops.
        hidden_dim: hidden width of the head.
        bottleneck_dim: width of the head before its last layer.
        num_outputs: width of the head's output.
        head_batch_norm: normalize the head's hidden layers by batch.
        student_temperature: divides the student's scores.
        teacher_temperature: divides the teacher's scores; smaller than the student's, which sharpens.
        teacher_temperature_start: the teacher's temperature in the beginning.
        teacher_temperature_warmup: duration of the way from the one to the other.
        center_momentum: how much of itself the center keeps at a step; with 1 it stays at zero.
        momentum: how much of itself the teacher keeps at a step, in the beginning; rises to 1.
        freeze_last_layer: for how long the head's last layer stays as it is.
    """

    center: Tensor
    seen: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        global_1: View = GLOBAL_1,
        global_2: View = GLOBAL_2,
        local: View = LOCAL,
        num_local: int = 8,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_outputs: int = 65536,
        head_batch_norm: bool = False,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        teacher_temperature_start: float = 0.04,
        teacher_temperature_warmup: Duration = 30,
        center_momentum: float = 0.9,
        momentum: float = 0.996,
        freeze_last_layer: Duration = 1,
    ) -> None:
        super().__init__()
        self.crops = (global_1, global_2, *[local] * num_local)
        if isinstance(backbone, VisionTransformer):
            for view in self.crops:
                patch_grid(view.size, view.size, backbone.patch_size)  # refuses crops that cannot be cut into patches
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.teacher_temperature_start = teacher_temperature_start
        self.teacher_temperature_warmup = teacher_temperature_warmup
        self.center_momentum, self.momentum, self.freeze_last_layer = center_momentum, momentum, freeze_last_layer
        self.backbone = backbone
        self.head = DINOHead(backbone_dim(backbone), hidden_dim, bottleneck_dim, num_outputs, 3, head_batch_norm)
        self.teacher_backbone, self.teacher_head = EMA(self.backbone), EMA(self.head)
        self.register_buffer("center", torch.zeros(num_outputs))
        # What the center moves to when the step is taken: a batch may come in several parts.
        self.register_buffer("seen", torch.zeros(num_outputs), persistent=False)
        self.parts = 0

    def views(self) -> tuple[View, ...]:
        return self.crops

    def sharpness(self, clock: Clock) -> float:
        """The teacher's temperature at this step."""
        end = in_steps(self.teacher_temperature_warmup, clock.total_steps, clock.steps_per_epoch)
        return Linear(self.teacher_temperature_start, self.teacher_temperature).value(clock, 0, end)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        n, globals_ = len(batch.index), torch.cat(batch.views[:2])
        # Crops of one size go through together, so that batch norm sees all of them, as in the authors' code.
        features = [self.backbone(globals_)]
        if len(batch.views) > 2:
            features.append(self.backbone(torch.cat(batch.views[2:])))
        frozen = clock.step < in_steps(self.freeze_last_layer, clock.total_steps, clock.steps_per_epoch)
        student = self.head(torch.cat(features), frozen).unflatten(0, (len(batch.views), n))
        scores = self.teacher_head(self.teacher_backbone(globals_)).unflatten(0, (2, n))
        with torch.autocast(scores.device.type, enabled=False):
            teacher = teacher_distribution(scores, self.center, self.sharpness(clock))
            loss = dino_loss(student, teacher, self.student_temperature)
            if self.training:
                self.seen += distributed.all_reduce_mean(scores.mean(dim=(0, 1)))
                self.parts += 1
            average = distributed.all_reduce_mean(teacher.mean(dim=(0, 1)))
        return {"loss": loss, "teacher_entropy": entropy(teacher).mean(), "average_entropy": entropy(average)}

    def after_step(self, clock: Clock) -> None:
        if self.parts:
            self.center.lerp_(self.seen / self.parts, 1 - self.center_momentum)
            self.seen.zero_()
            self.parts = 0
        momentum = Cosine(self.momentum, 1.0)(clock)
        self.teacher_backbone.update(self.backbone, momentum)
        self.teacher_head.update(self.head, momentum)
