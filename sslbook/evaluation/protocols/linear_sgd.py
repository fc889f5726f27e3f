"""Linear probe by stochastic gradients: the protocol of papers, on features of augmented images.

A linear layer on frozen features, trained for about 100 epochs on random crops (Zhang et al., 2016; He et al., 2020,
section 4.1). Its learning rate decides the figure and depends on the method, so the heads of a whole grid are trained at
once and one is chosen on training images that were set aside (Oquab et al., 2023, appendix B.3, does so on test images).
`--cached true` extracts the features of the evaluation view once, which suits small data.
"""

from torch import nn

from sslbook.data.loader import Data
from sslbook.evaluation.augment import Augmentation
from sslbook.evaluation.base import Metrics, Representation
from sslbook.evaluation.classifier import Task, Training
from sslbook.evaluation.heads import Pool, lacks_blocks, linear, reading_of
from sslbook.evaluation.protocols.knn import majority
from sslbook.evaluation.transfer import TransferProtocol, grid, transfer
from sslbook.types import Fraction, PositiveInt

CROP_AND_FLIP = Augmentation()
TRAINING = Training(epochs=100, batch_size=256)


class LinearSGD(TransferProtocol):
    """Accuracy of a linear layer that is trained by stochastic gradients.

    Args:
        lrs: learning rates; all are trained at once.
        weight_decays: weight decays, each with every learning rate.
        training: epochs, batch size, optimizer, schedule.
        augmentation: of the training images.
        cached: extract the features of the evaluation view once, without augmentation.
        pool: the backbone's own feature; or of a transformer's last blocks the class tokens (cls), the mean of the patch
            tokens (mean), or the class tokens and the last block's mean (cls+mean).
        num_blocks: how many of the last blocks, side by side: 4 as DINO has it for ViT-S.
        batch_norm: batch norm without learned scale and shift before the layer, as MAE has it.
        flip_test: add the probabilities of the mirrored test image.
        validation: the fraction of each class that is set aside for the choice.
    """

    def __init__(
        self,
        lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
        weight_decays: tuple[float, ...] = (0.0,),
        training: Training = TRAINING,
        augmentation: Augmentation = CROP_AND_FLIP,
        cached: bool = False,
        pool: Pool = "backbone",
        num_blocks: PositiveInt = 1,
        batch_norm: bool = False,
        flip_test: bool = False,
        validation: Fraction = 0.1,
    ) -> None:
        reading_of(pool, num_blocks)
        self.settings = grid(lrs, weight_decays)
        self.training, self.augmentation, self.cached = training, augmentation, cached
        self.pool, self.num_blocks, self.batch_norm, self.flip_test = pool, num_blocks, batch_norm, flip_test
        self.validation = validation

    def run(self, model: Representation, data: Data) -> Metrics:
        task = Task(
            self.name,
            self.options(),
            lambda shape, classes: linear(shape[-1], classes),
            self.training,
            None if self.cached else self.augmentation,
            reading_of(self.pool, self.num_blocks),
            batch_norm=self.batch_norm,
            flip_test=self.flip_test and not self.cached,
            validation=self.validation,
        )
        return self.note(model, {"linear SGD": transfer(model, data, task, self.settings)[0]})

    def chance(self, data: Data) -> Metrics:
        return {"linear SGD": majority(data.labels("train"), data.labels("test"))}

    def lacks(self, backbone: nn.Module, data: Data) -> str | None:
        blocks = None if self.pool == "backbone" else lacks_blocks(backbone, self.num_blocks)
        return super().lacks(backbone, data) or blocks
