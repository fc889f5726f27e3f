"""Robustness: the accuracy of a classifier on corrupted test images, trained on clean ones.

A linear probe, or kNN, is trained on features of the clean training images. It classifies the test images under the
fifteen corruptions of ImageNet-C at five severities each (Hendrycks and Dietterich, 2019, "Benchmarking neural network
robustness to common corruptions and perturbations"; what our implementation does differently stands in
`sslbook.evaluation.corruptions`). Images are corrupted after resize and crop, as there.

- corrupted: the mean accuracy over corruptions and severities; the mean corruption error is 100 minus that;
- lost: the clean accuracy minus the corrupted one, the relative mean corruption error without a reference model;
- mCE (of 1,000 classes, taken for ImageNet's): each corruption's error divided by AlexNet's, in percent (their equation
  in section 4.1 and table 1).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from sslbook import distributed
from sslbook.data.loader import Data
from sslbook.errors import UserError
from sslbook.evaluation.base import Metrics, Protocol, Representation
from sslbook.evaluation.corruptions import NAMES, corrupt, require
from sslbook.evaluation.features import device_of, frozen
from sslbook.evaluation.protocols import knn, linear
from sslbook.evaluation.protocols.knn import majority

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Mean error of AlexNet over the severities of each corruption, in percent: table 1 of the paper.
ALEXNET = dict(zip(NAMES, (88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.7)))
SHOWN = 3  # severity of the images that are plotted


class Robustness(Protocol):
    """Accuracy under the corruptions of ImageNet-C of a classifier that was trained on clean images.

    Args:
        classifier: trained on the clean features: a linear probe, or kNN with k = 20.
        corruptions: names of some of the fifteen; by default all.
        severities: some of 1 to 5; by default all.
    """

    title = "Robustness: accuracy on corrupted test images"
    cost = "75 passes over the test images"

    def __init__(
        self,
        classifier: Literal["linear", "knn"] = "linear",
        corruptions: list[str] | None = None,
        severities: list[int] | None = None,
    ) -> None:
        self.classifier = classifier
        self.corruptions = list(NAMES) if corruptions is None else corruptions
        self.severities = [1, 2, 3, 4, 5] if severities is None else severities
        if not self.corruptions or not self.severities:
            raise UserError("robustness: give at least one corruption and one severity")
        for name in self.corruptions:
            for severity in self.severities:
                require(name, severity)
        self._accuracy = torch.empty(0)
        self._example = torch.empty(0)

    def lacks(self, backbone: nn.Module, data: Data) -> str | None:
        if (data.channels or 3) != 3:
            return f"color images; those of {data.name} have {data.channels} channels"
        return super().lacks(backbone, data)

    def run(self, model: Representation, data: Data) -> Metrics:
        train_x, train_y, test_x, test_y = model.labeled()
        ranked = linear.train(train_x, train_y, seed=model.seed)[0].ranked if self.classifier == "linear" else None

        def classify(x: Float[Tensor, "n dim"]) -> Int[Tensor, "n"]:
            if ranked is not None:
                return ranked(x)[:, 0]
            return knn.predict(train_x, train_y, x, device=model.device)

        clean = 100 * (classify(test_x) == test_y).double().mean().item()
        self._accuracy = self._corrupted(model, data, classify)
        by_corruption = dict(zip(self.corruptions, self._accuracy.mean(dim=1).tolist()))
        corrupted = float(self._accuracy.mean())
        metrics = {"clean": clean, "corrupted": corrupted, "lost": clean - corrupted}
        if data.num_classes == 1000 and self.corruptions == list(NAMES) and len(self.severities) == 5:
            errors = [100 * (100 - by_corruption[name]) / ALEXNET[name] for name in NAMES]
            metrics["mCE"] = sum(errors) / len(errors)
        accuracy = {name: dict(zip(map(str, self.severities), row)) for name, row in self._by_name()}
        model.details[self.name] = {"accuracy by severity": accuracy, "classifier": self.classifier}
        return {**metrics, **by_corruption}

    def _by_name(self) -> list[tuple[str, list[float]]]:
        return [(name, row.tolist()) for name, row in zip(self.corruptions, self._accuracy)]

    def _corrupted(
        self, model: Representation, data: Data, classify: Callable[[Tensor], Int[Tensor, "n"]]
    ) -> Float[Tensor, "corruptions severities"]:
        """Accuracy, in percent, of every corruption and severity. The images are read once; processes divide them."""
        device = device_of(model.backbone) if model.device is None else torch.device(model.device)
        view = data.adapted(model.view)  # what the classifier was trained on
        mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (view.mean, view.std))
        correct = torch.zeros(len(self.corruptions), len(self.severities) + 1, dtype=torch.int64)  # last column: all
        rank, processes = distributed.rank(), distributed.world_size()
        batches = data.evaluation_batches("test", view, model.batch_size, device, rank=rank, world_size=processes)
        total = -(-data.num_test // (model.batch_size * processes)) * len(self.corruptions)
        bar = tqdm(total=total, desc="corruptions", leave=False, disable=not model.progress or None)
        with frozen(model.backbone), torch.autocast(device.type, enabled=False), bar:
            for batch in batches:
                images, labels = (batch.views[0] * std + mean).clamp(0, 1), batch.label.cpu()
                self._example = images[:1].cpu() if not len(self._example) else self._example
                correct[:, -1] += int((labels >= 0).sum())
                for i, name in enumerate(self.corruptions):
                    for j, severity in enumerate(self.severities):
                        changed = corrupt(images, name, severity, batch.index, model.seed)
                        x = model.backbone((changed - mean) / std).float().cpu()
                        correct[i, j] += int((classify(x) == labels).sum())
                    bar.update()
        correct = distributed.all_reduce_sum(correct.to(device)).cpu()
        return 100 * correct[:, :-1].double() / correct[:, -1:]

    def chance(self, data: Data) -> Metrics:
        level = majority(data.labels("train"), data.labels("test"))
        return dict.fromkeys(("clean", "corrupted", *self.corruptions), level)

    def figures(self) -> dict[str, "Figure"]:
        from sslbook.notebook import style

        order = sorted(self._by_name(), key=lambda one: sum(one[1]))
        alt = f"Accuracy falls with the severity, most under {order[0][0]} and least under {order[-1][0]}."
        figure, ax = style.figure(alt=alt, caption=None, width=7.0, height=4.5)
        for name, row in order:
            ax.plot(self.severities, row, color=style.GRAY, linewidth=1)
            ax.text(self.severities[-1], row[-1], f" {name}", va="center", fontsize=8)
        ax.plot(self.severities, self._accuracy.mean(dim=0).tolist(), color=style.BLUE, label="mean")
        ax.set_xticks(self.severities)
        ax.set_xlabel("severity")
        ax.set_ylabel("accuracy, %")
        ax.legend(loc="lower left")
        alt = f"One test image under {len(self.corruptions)} corruptions."
        columns = min(5, len(self.corruptions))
        rows = -(-len(self.corruptions) // columns)
        sheet, axes = style.figure(
            alt=alt, caption=None, rows=rows, columns=columns, width=1.5 * columns, height=1.7 * rows, squeeze=False
        )
        severity = min(self.severities, key=lambda s: abs(s - SHOWN))
        for ax in axes.flat:
            ax.set_axis_off()
        for name, ax in zip(self.corruptions, axes.flat):
            index = torch.zeros(1, dtype=torch.int64)
            ax.imshow(corrupt(self._example, name, severity, index)[0].permute(1, 2, 0).numpy())
            ax.set_title(name, fontsize=9)
        return {"severity": figure, "images": sheet}
