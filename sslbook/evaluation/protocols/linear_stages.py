"""Linear probe of every stage: where in the network the classes become linearly separable.

The maps of stem and stages, pooled to about 9,000 numbers each and normalized by batch norm without learned scale and
shift, feed one linear layer each (Goyal et al., 2019, arXiv:1905.01235, section 6; OpenSelfSup's multi-head benchmark).
Of a transformer it is the mean patch token after every block. All layers are trained on one forward pass, each with its own
learning rate. Pretext tasks are often best in the middle, and a table of the last layer alone hides it.
"""

from torch import nn

from sslbook.data.loader import Data
from sslbook.evaluation.augment import Augmentation
from sslbook.evaluation.base import Metrics, Representation
from sslbook.evaluation.classifier import Task, Training
from sslbook.evaluation.heads import linear, stages
from sslbook.evaluation.transfer import TransferProtocol, grid, transfer
from sslbook.schedules import Step
from sslbook.types import Fraction

# OpenSelfSup, configs/benchmarks/linear_classification/imagenet/r50_multihead.py
TRAINING = Training(epochs=90, batch_size=256, optimizer="nesterov", schedule=Step([60, 80]))
AUGMENTATION = Augmentation(interpolation="bicubic", color_jitter=(0.4, 0.4, 0.4, 0.0))


class LinearStages(TransferProtocol):
    """Accuracy of a linear layer on every stage of the network.

    Args:
        lrs: learning rates; all are trained at once, and one is chosen for every stage.
        weight_decays: weight decays, each with every learning rate.
        training: epochs, batch size, optimizer, schedule.
        augmentation: of the training images.
        cached: extract the features of the evaluation view once, without augmentation.
        flip_test: add the probabilities of the mirrored test image.
        validation: the fraction of each class that is set aside for the choice.
    """

    title = "Linear layer on every stage, from the input to the output: accuracy in %"

    def __init__(
        self,
        lrs: tuple[float, ...] = (0.01,),
        weight_decays: tuple[float, ...] = (1e-4,),
        training: Training = TRAINING,
        augmentation: Augmentation = AUGMENTATION,
        cached: bool = False,
        flip_test: bool = False,
        validation: Fraction = 0.1,
    ) -> None:
        self.settings = grid(lrs, weight_decays)
        self.training, self.augmentation, self.cached = training, augmentation, cached
        self.flip_test, self.validation = flip_test, validation

    def run(self, model: Representation, data: Data) -> Metrics:
        task = Task(
            self.name,
            self.options(),
            lambda shape, classes: linear(shape[-1], classes),
            self.training,
            None if self.cached else self.augmentation,
            stages,
            batch_norm=True,
            flip_test=self.flip_test and not self.cached,
            validation=self.validation,
        )
        outcomes = transfer(model, data, task, self.settings)
        what = "block" if hasattr(model.backbone, "blocks") else "stage"
        first = 0 if hasattr(model.backbone, "maxpool") else 1  # the stem
        return self.note(model, {f"{what} {i}": outcome for i, outcome in enumerate(outcomes, start=first)})

    def lacks(self, backbone: nn.Module, data: Data) -> str | None:
        transformer = hasattr(backbone, "blocks") and hasattr(backbone, "forward_tokens")
        if not (transformer or hasattr(backbone, "forward_stages")):
            return f"a backbone with stages (a method forward_stages) or blocks, unlike {type(backbone).__name__}"
        return super().lacks(backbone, data)
