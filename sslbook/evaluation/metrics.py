"""What protocols report beside an accuracy: scikit-learn's metrics by class, and of images with several labels.

Percentages throughout. Class numbers are those of the data; a class without test images has no recall and is left out of
means over classes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MANY = 10  # classes; with more of them top-5 is reported too
LARGEST = 100  # classes of a confusion matrix that is stored
SHOWN = 40  # classes of one that is plotted


def top_k(ranked: Int[Tensor, "n k"], target: Int[Tensor, "n"]) -> float:
    """Percentage of rows whose target is among the k predicted labels."""
    return 100 * (ranked == target[:, None]).any(dim=1).double().mean().item()


def classification(
    predicted: Int[Tensor, "n"], target: Int[Tensor, "n"], class_names: Sequence[str] = ()
) -> dict[str, Any]:
    """Accuracy; precision, recall and F1 over classes (macro) and over images (micro); each by class; the confusion matrix.

    A precision whose class is never predicted is 0.

    Args:
        predicted: labels.
        target: the true labels.
        class_names: in the order of the labels; by default the labels are their own names.

    Returns:
        What a result file can hold. `confusion["counts"][i][j]` are the images of class i that were predicted as j.
    """
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    y, found = target.cpu().numpy(), predicted.cpu().numpy()
    present = np.unique(y)
    options = {"labels": present, "zero_division": 0}
    by_class = precision_recall_fscore_support(y, found, average=None, **options)
    values: dict[str, Any] = {"accuracy": 100 * float((y == found).mean())}
    for average in ("macro", "micro"):
        precision, recall, f1, _ = precision_recall_fscore_support(y, found, average=average, **options)
        values[average] = {"precision": 100 * float(precision), "recall": 100 * float(recall), "F1": 100 * float(f1)}
    values["classes"] = {
        _name(label, class_names): {
            "precision": 100 * float(precision),
            "recall": 100 * float(recall),
            "F1": 100 * float(f1),
            "images": int(images),
        }
        for label, precision, recall, f1, images in zip(present.tolist(), *by_class)
    }
    if len(every := np.union1d(present, found)) <= LARGEST:
        counts = confusion_matrix(y, found, labels=every).tolist()
        values["confusion"] = {"classes": [_name(label, class_names) for label in every.tolist()], "counts": counts}
    return values


def average_precision(
    scores: Float[Tensor, "n classes"], targets: Int[Tensor, "n classes"], interpolated: bool = False
) -> Float[Tensor, "classes"]:
    """Average precision of each class, in percent; nan where none of its images is positive.

    Args:
        scores: higher for images that more likely show the class.
        targets: 1 where an image shows it, 0 where not, -1 where the image does not count for the class (difficult).
        interpolated: precision at a recall is the best at that recall or more, as PASCAL VOC has computed it since 2010,
            and never lower; by default scikit-learn's, without interpolation.
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve

    found = []
    for score, target in zip(scores.T.cpu().double().numpy(), targets.T.cpu().numpy()):
        score, target = score[target >= 0], target[target >= 0]
        if not target.any():
            found.append(float("nan"))
        elif interpolated:
            precision, recall, _ = precision_recall_curve(target, score)  # recall descends
            best = np.maximum.accumulate(precision)
            found.append(float(-np.sum(np.diff(recall) * best[:-1])))
        else:
            found.append(float(average_precision_score(target, score)))
    return 100 * torch.tensor(found, dtype=torch.float64)


def multi_label(predicted: Bool[Tensor, "n classes"], targets: Int[Tensor, "n classes"]) -> dict[str, float]:
    """Precision, recall and F1 per class (CP, CR, CF1) and overall (OP, OR, OF1) of images with several labels.

    As in Wang et al. (2016, "CNN-RNN: A unified framework for multi-label image classification"), section 4.1: CP and CR
    are means over classes, and CF1 is the harmonic mean of the two. (scikit-learn's macro F1 is the mean of the classes'
    F1.) Targets of -1 do not count.

    Args:
        predicted: whether a class is predicted.
        targets: 1, 0, or -1.
    """
    counted = (targets >= 0).cpu().numpy()
    truth, found = (targets.cpu().numpy() == 1), predicted.cpu().numpy() & counted
    hits, guessed, positive = ((truth & found).sum(0), found.sum(0), truth.sum(0))
    shown = positive > 0  # a class without positives has no recall
    by_class = [float(np.mean(hits[shown] / np.maximum(whole[shown], 1))) for whole in (guessed, positive)]
    overall = [float(hits.sum() / max(whole.sum(), 1)) for whole in (guessed, positive)]

    def three(prefix: str, precision: float, recall: float) -> dict[str, float]:
        f1 = 2 * precision * recall / max(precision + recall, 1e-12)
        return {f"{prefix}P": 100 * precision, f"{prefix}R": 100 * recall, f"{prefix}F1": 100 * f1}

    return {**three("C", *by_class), **three("O", *overall)}


def confusion_figure(confusion: dict[str, Any], title: str) -> "Figure":
    """The confusion matrix of `classification` as an image: a row a class, in percent of its images."""
    from sslbook.notebook import style

    counts, names = np.array(confusion["counts"], dtype=float), confusion["classes"]
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    diagonal = np.diag(share)[counts.sum(1) > 0]
    off = share - np.diag(np.diag(share))
    i, j = np.unravel_index(off.argmax(), off.shape)
    alt = (
        f"Confusion matrix: on average {diagonal.mean():.0f} % of a class are classified correctly; "
        f"the most frequent confusion is {names[i]} as {names[j]}, {off[i, j]:.0f} %."
    )
    side = min(9.0, 2.2 + 0.3 * len(names))
    figure, ax = style.figure(alt=alt, width=side, height=side, caption=None)
    ax.imshow(share, vmin=0, vmax=100)
    if len(names) <= SHOWN:
        ax.set_xticks(range(len(names)), names, rotation=90)
        ax.set_yticks(range(len(names)), names)
    if len(names) <= 12:
        for (row, column), value in np.ndenumerate(share):
            color = "white" if value < 60 else "black"
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", color=color, fontsize=8)
    ax.set_xlabel("predicted")
    ax.set_ylabel("class")
    ax.set_title(f"{title}: percent of each class")
    return figure


def _name(label: int, class_names: Sequence[str]) -> str:
    return class_names[label] if 0 <= label < len(class_names) else str(label)
