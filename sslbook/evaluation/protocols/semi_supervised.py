"""Semi-supervised: the whole network trained with the labels of 1 % or 10 % of the training images.

Hénaff et al., 2020 (arXiv:1905.09272) and SimCLR (Chen et al., 2020, section 6), whose lists of ImageNet's images name the
same fractions for everybody; here `names` reads such a list. Without one, the fraction is sampled from every class, keyed by
the seed. The learning rate and its factor for the head are chosen on a part of these few images (OpenSelfSup reports the
best of nine on the test images, which reads higher).
"""

from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from sslbook.data.loader import Data
from sslbook.errors import UserError, explained
from sslbook.evaluation.augment import Augmentation
from sslbook.evaluation.base import Metrics, Representation
from sslbook.evaluation.classifier import Task, Training
from sslbook.evaluation.heads import linear
from sslbook.evaluation.protocols.knn import majority
from sslbook.evaluation.protocols.linear import stratified
from sslbook.evaluation.transfer import TransferProtocol, grid, transfer
from sslbook.files import read_text
from sslbook.schedules import Step
from sslbook.types import Fraction

CROP_AND_FLIP = Augmentation()
TRAINING = Training(epochs=20, batch_size=256, schedule=Step([12, 16], factor=0.2))  # OpenSelfSup


class SemiSupervised(TransferProtocol):
    """Accuracy of the network trained whole on a fraction of the labels.

    Args:
        fraction: of the images of each class, at least one image; 0.01 and 0.1 are usual.
        names: instead, a text file that names the images, one file name a line, such as SimCLR's 1percent.txt.
        lrs: learning rates; each is a training of its own, with every factor of the head.
        head_lr_scales: factors of the learning rate for the head.
        weight_decays: weight decays, each with every learning rate.
        training: epochs, batch size, optimizer, schedule.
        augmentation: of the training images.
        flip_test: add the probabilities of the mirrored test image.
        validation: the fraction of each class, of the few images, that is set aside for the choice.
    """

    trains = True

    def __init__(
        self,
        fraction: float = 0.1,
        names: Path | None = None,
        lrs: tuple[float, ...] = (0.1, 0.01, 0.001),
        head_lr_scales: tuple[float, ...] = (1.0, 10.0, 100.0),
        weight_decays: tuple[float, ...] = (1e-4,),
        training: Training = TRAINING,
        augmentation: Augmentation = CROP_AND_FLIP,
        flip_test: bool = False,
        validation: Fraction = 0.2,
    ) -> None:
        if not 0 < fraction <= 1:
            raise UserError(f"fraction is {fraction}: give more than 0, and at most 1")
        self.fraction, self.names = fraction, names
        self.settings = grid(lrs, weight_decays, head_lr_scales)
        self.training, self.augmentation = training, augmentation
        self.flip_test, self.validation = flip_test, validation

    def run(self, model: Representation, data: Data) -> Metrics:
        task = Task(
            self.name,
            self.options(),
            lambda shape, classes: linear(shape[-1], classes),
            self.training,
            self.augmentation,
            frozen="none",
            flip_test=self.flip_test,
            validation=self.validation,
        )
        positions = self.positions(data, model.seed)
        metrics = self.note(model, {self._metric: transfer(model, data, task, self.settings, positions)[0]})
        model.details[self.name]["training images"] = len(positions)
        return metrics

    def positions(self, data: Data, seed: int) -> Int[Tensor, "some"]:
        """The labeled training images that are used, in order.

        Raises:
            UserError: the list cannot be read, names images that are not there, or no labeled one.
        """
        labels = data.labels("train")
        labeled = (labels >= 0).nonzero()[:, 0]
        if self.names is None:
            if self.fraction == 1:
                return labeled
            return labeled[few(labels[labeled], self.fraction, seed)]
        cure = "give a text file of image names"
        with explained(f"names: {self.names} cannot be read", OSError, UnicodeDecodeError, cure=cure):
            wanted = read_text(self.names.expanduser()).split()
        if (own := data.file_names()) is None:
            raise UserError("names: these images are no files, so a list cannot name them; give a fraction instead")
        where = {name: i for i, name in enumerate(own)}
        names = [line.rpartition("/")[2] for line in wanted]
        if missing := [name for name in names if name not in where]:
            raise UserError(
                f"{self.names} names {len(missing)} images that {data.name} lacks: {', '.join(missing[:3])}"
            )
        chosen = torch.tensor([where[name] for name in dict.fromkeys(names)], dtype=torch.int64)
        if not (labels[chosen] >= 0).any():
            raise UserError(f"{self.names} names no labeled image of {data.name}: write a file name on each line")
        return chosen[labels[chosen] >= 0].sort().values

    @property
    def _metric(self) -> str:
        return "labels of a list" if self.names else f"{100 * self.fraction:g} % labels"

    def chance(self, data: Data) -> Metrics:
        return {self._metric: majority(data.labels("train"), data.labels("test"))}


def few(labels: Int[Tensor, "n"], fraction: float, seed: int) -> Tensor:
    """Marks a fraction of every class, at least one image; the choice is keyed by `seed`."""
    marked = stratified(labels, fraction, seed)
    for label, n in zip(*labels.unique(return_counts=True)):
        if n == 1:  # of which `stratified` leaves the only image unmarked
            marked[labels == label] = True
    return marked
