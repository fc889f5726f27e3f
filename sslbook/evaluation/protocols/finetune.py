"""Fine-tuning: the whole network trained with labels, from the weights in question.

How methods that predict masked patches are compared (He et al., 2022, MAE, appendix A.1; Bao et al., 2022, BEiT; Xie et al.,
2022, SimMIM), with layer-wise decay of the learning rate, RandAugment, Mixup and CutMix; and what SimCLR reports for
transfer (Chen et al., 2020, appendix B.8). Random weights trained in the same way stand beside it: that difference is what
pre-training was worth, and with enough labels it is small.
"""

from typing import Literal

import torch
from torch import nn

from sslbook.data.loader import Data
from sslbook.evaluation.augment import Augmentation
from sslbook.evaluation.base import Metrics, Representation
from sslbook.evaluation.classifier import Task, Training, set_drop_path
from sslbook.evaluation.heads import blocks, feature, lacks_blocks, linear
from sslbook.evaluation.protocols.knn import majority
from sslbook.evaluation.transfer import TransferProtocol, grid, transfer, with_backbone
from sslbook.types import Fraction, PositiveFloat

CROP_AND_FLIP = Augmentation()
TRAINING = Training(epochs=50, batch_size=256, optimizer="adamw")


class FineTune(TransferProtocol):
    """Accuracy of the network trained whole, or from some layer on.

    Args:
        lrs: learning rates; with several, each is a training of its own.
        weight_decays: weight decays, each with every learning rate.
        head_lr_scales: factors of the learning rate for the head, each with every learning rate.
        training: epochs, batch size, optimizer, schedule.
        augmentation: of the training images.
        frozen: none; or the number of the last layer that stays as it is (0: stem or embedding, then stages or blocks), or
            the name of a module.
        layer_decay: factor of the learning rate for every layer further from the backbone's end.
        drop_path: probability of dropping a residual branch in the last block, rising linearly from 0 in the first; null
            leaves it as the backbone was built.
        pool: the backbone's own feature, or the mean of the last block's patch tokens with a norm of its own (MAE, BEiT).
        head_std: standard deviation of the head's initial weights.
        ema: momentum of a moving average of the weights, which is then evaluated; 0 for none.
        flip_test: add the probabilities of the mirrored test image.
        validation: the fraction of each class that is set aside for a choice.
    """

    trains = True

    def __init__(
        self,
        lrs: tuple[float, ...] = (1e-3,),
        weight_decays: tuple[float, ...] = (0.05,),
        head_lr_scales: tuple[float, ...] = (1.0,),
        training: Training = TRAINING,
        augmentation: Augmentation = CROP_AND_FLIP,
        frozen: int | str = "none",
        layer_decay: PositiveFloat | None = None,
        drop_path: float | None = None,
        pool: Literal["backbone", "mean"] = "backbone",
        head_std: PositiveFloat = 0.01,
        ema: float = 0.0,
        flip_test: bool = False,
        validation: Fraction = 0.1,
    ) -> None:
        self.settings = grid(lrs, weight_decays, head_lr_scales)
        self.training, self.augmentation, self.frozen = training, augmentation, frozen
        self.layer_decay, self.drop_path, self.pool, self.head_std = layer_decay, drop_path, pool, head_std
        self.ema, self.flip_test, self.validation = ema, flip_test, validation

    def run(self, model: Representation, data: Data) -> Metrics:
        task = Task(
            self.name,
            self.options(),
            self._head,
            self.training,
            self.augmentation,
            feature if self.pool == "backbone" else _mean_of_patches,
            frozen=self.frozen,
            layer_decay=self.layer_decay,
            ema=self.ema,
            flip_test=self.flip_test,
            validation=self.validation,
        )
        if self.drop_path is not None:
            model = with_backbone(model)
            set_drop_path(model.backbone, self.drop_path)
        return self.note(model, {"fine-tuned": transfer(model, data, task, self.settings)[0]})

    def _head(self, shape: torch.Size, num_classes: int) -> nn.Module:
        layer = linear(shape[-1], num_classes, self.head_std)
        return layer if self.pool == "backbone" else nn.Sequential(nn.LayerNorm(shape[-1], eps=1e-6), layer)

    def chance(self, data: Data) -> Metrics:
        return {"fine-tuned": majority(data.labels("train"), data.labels("test"))}

    def lacks(self, backbone: nn.Module, data: Data) -> str | None:
        return super().lacks(backbone, data) or (lacks_blocks(backbone) if self.pool == "mean" else None)


def _mean_of_patches(backbone: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    return blocks(backbone, x, pool="mean", norm=False)
