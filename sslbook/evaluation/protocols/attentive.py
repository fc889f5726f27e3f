"""Attentive probe: a learned query that attends to all tokens of a frozen backbone, then a linear layer.

Methods that predict masked patches spread what they know over the patch tokens; an average of these, or the class token,
which no loss has trained, hides it (Bardes et al., 2024, V-JEPA, arXiv:2404.08471, section 5; Assran et al., 2025, V-JEPA 2,
arXiv:2506.09985; CAPI, arXiv:2502.08769). The probe has parameters of its own, so its figures are compared with each other
and not with those of a linear probe. The probes of all learning rates and weight decays share one pass over the tokens.
"""

from functools import partial
from typing import Annotated

import torch
from torch import nn

from sslbook.data.loader import Data
from sslbook.evaluation.augment import Augmentation
from sslbook.evaluation.base import Metrics, Representation
from sslbook.evaluation.classifier import Task, Training
from sslbook.evaluation.heads import Attentive, tokens
from sslbook.evaluation.protocols.knn import majority
from sslbook.evaluation.transfer import TransferProtocol, grid, transfer
from sslbook.types import Above, Fraction, PositiveInt

CROP_AND_FLIP = Augmentation()
TRAINING = Training(epochs=20, batch_size=256, optimizer="adamw")


class AttentiveProbe(TransferProtocol):
    """Accuracy of an attentive probe on the tokens of the last layer.

    Args:
        lrs: learning rates; all are trained at once.
        weight_decays: weight decays, each with every learning rate.
        num_heads: attention heads; a divisor of the width of a token.
        num_blocks: 1 for V-JEPA's block of cross-attention; 4 puts three blocks of self-attention before it, as V-JEPA 2
            does; 0 for CAPI's probe: a query, keys and values, and no more.
        training: epochs, batch size, optimizer, schedule.
        augmentation: of the training images.
        cached: extract the tokens of the evaluation view once, without augmentation; they need much memory.
        flip_test: add the probabilities of the mirrored test image.
        validation: the fraction of each class that is set aside for the choice.
    """

    needs = "tokens"

    def __init__(
        self,
        lrs: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3),
        weight_decays: tuple[float, ...] = (0.01, 0.1),
        num_heads: PositiveInt = 16,
        num_blocks: Annotated[int, Above(-1)] = 1,
        training: Training = TRAINING,
        augmentation: Augmentation = CROP_AND_FLIP,
        cached: bool = False,
        flip_test: bool = False,
        validation: Fraction = 0.1,
    ) -> None:
        self.settings = grid(lrs, weight_decays)
        self.num_heads, self.num_blocks = num_heads, num_blocks
        self.training, self.augmentation, self.cached = training, augmentation, cached
        self.flip_test, self.validation = flip_test, validation

    def run(self, model: Representation, data: Data) -> Metrics:
        task = Task(
            self.name,
            self.options(),
            partial(_probe, num_heads=self.num_heads, num_blocks=self.num_blocks),
            self.training,
            None if self.cached else self.augmentation,
            tokens,
            flip_test=self.flip_test and not self.cached,
            validation=self.validation,
        )
        return self.note(model, {"attentive": transfer(model, data, task, self.settings)[0]})

    def chance(self, data: Data) -> Metrics:
        return {"attentive": majority(data.labels("train"), data.labels("test"))}

    def lacks(self, backbone: nn.Module, data: Data) -> str | None:
        if (lack := super().lacks(backbone, data)) is not None:
            return lack
        dim = getattr(backbone, "dim", self.num_heads)
        if isinstance(dim, int) and dim % self.num_heads:
            return f"num_heads that divide {dim}, the width of a token, unlike {self.num_heads}"
        return None


def _probe(shape: torch.Size, num_classes: int, num_heads: int, num_blocks: int) -> Attentive:
    return Attentive(shape[-1], num_classes, num_heads, num_blocks)
