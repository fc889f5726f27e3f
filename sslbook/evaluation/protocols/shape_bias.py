"""Shape bias: does a classifier follow the shape or the texture of an image in which the two disagree?

Geirhos et al. (2019, "ImageNet-trained CNNs are biased towards texture; increasing shape bias improves accuracy and
robustness", section 2): of the cue-conflict images that are classified as their shape or as their texture, the fraction
classified as their shape. People decide for the shape in 96 % of the authors' images, ResNet-50 in 22 %.

A linear probe is trained on the labeled images and classifies the conflicting ones. Their names say both classes, as the
authors' do: FOLDER/airplane/airplane1-bicycle2.png has the shape of an airplane and the texture of a bicycle. A category
is a class of the data of that name; of 1,000 classes, taken for ImageNet's, it is one of the authors' 16 categories, whose
probability is the mean over its classes. Only categories compete.

Without a folder, conflicting images are made of pairs of test images: the phases of one (its edges) and the amplitudes of
the other (its frequencies and colors) in Fourier space (Oppenheim and Lim, 1981). That asks the same question of any
labeled images, but its figures are not comparable with the authors'.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook.data.executors import apply_one
from sslbook.data.images import EXTENSIONS, open_image
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError, at_least_one
from sslbook.evaluation.base import Metrics, Protocol, Representation
from sslbook.evaluation.features import extract_files
from sslbook.evaluation.protocols import linear
from sslbook.rng import permutation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CUE = r"[^\d-]+|\D+(?=\d)"  # a class whose own name has a hyphen is followed by a number
NAME = re.compile(rf"^(?P<shape>{CUE})\d*-(?P<texture>{CUE})\d*$")
# The classes of ImageNet, in the order of their WordNet numbers, that make up the 16 categories of Geirhos et al.: first
# and last of each run. Dogs and birds leave out classes whose WordNet parents are others.
IMAGENET: dict[str, list[tuple[int, int]]] = {
    "airplane": [(404, 404)],
    "bear": [(294, 297)],
    "bicycle": [(444, 444), (671, 671)],
    "bird": [
        *((8, 8), (10, 16), (18, 20), (22, 24), (80, 83), (87, 96), (98, 100)),
        *((127, 133), (135, 145)),
    ],
    "boat": [(472, 472), (554, 554), (625, 625), (814, 814), (914, 914)],
    "bottle": [(440, 440), (720, 720), (737, 737), (898, 899), (901, 901), (907, 907)],
    "car": [(436, 436), (511, 511), (817, 817)],
    "cat": [(281, 286)],
    "chair": [(423, 423), (559, 559), (765, 765), (857, 857)],
    "clock": [(409, 409), (530, 530), (892, 892)],
    "dog": [
        *((152, 191), (193, 203), (205, 226), (228, 241), (243, 250), (252, 257)),
        *((259, 259), (261, 263), (265, 268)),
    ],
    "elephant": [(385, 386)],
    "keyboard": [(508, 508), (878, 878)],
    "knife": [(499, 499)],
    "oven": [(766, 766)],
    "truck": [(555, 555), (569, 569), (656, 656), (675, 675), (717, 717), (734, 734), (864, 864), (867, 867)],
}


class ShapeBias(Protocol):
    """How often a linear probe follows the shape, and not the texture, of images in which they disagree.

    Args:
        folder: images named SHAPE-TEXTURE, such as airplane1-bicycle2.png, in any subfolders; by default they are made
            of pairs of test images.
        images: how many are made at most.
    """

    cost = "a linear probe"

    def __init__(self, folder: Path | None = None, images: int = 1000) -> None:
        at_least_one(images=images)
        self.folder, self.images = folder, images
        self._bias: dict[str, float] = {}

    def lacks(self, backbone: nn.Module, data: Data) -> str | None:
        if (data.channels or 3) != 3:
            return f"color images; those of {data.name} have {data.channels} channels"
        return super().lacks(backbone, data)

    def run(self, model: Representation, data: Data) -> Metrics:
        view = data.adapted(model.view)
        if self.folder is not None:
            paths, shapes, textures = conflicts(self.folder)
            load = lambda i: apply_one(view, open_image(paths[i]), 0, 0, i, 0)  # noqa: E731
            members = categories({*shapes, *textures}, data)
        else:
            pairs, shapes, textures = self._pairs(data, model.seed)
            load = lambda i: self._mixed(data, view, *pairs[i].tolist())  # noqa: E731
            members = {name: [i] for i, name in enumerate(data.class_names)}
        names = list(members)
        x = extract_files(
            model.backbone,
            len(shapes),
            load,
            device=model.device,
            batch_size=model.batch_size,
            progress=model.progress,
        )
        train_x, train_y, _, _ = model.labeled()
        classifier, penalty, _ = linear.train(train_x, train_y, seed=model.seed)
        chosen = [names[i] for i in decide(classifier, x, list(members.values()))]
        followed = [("shape" if c == s else "texture" if c == t else "") for c, s, t in zip(chosen, shapes, textures)]
        counts = {
            name: [sum(f == cue for f, s in zip(followed, shapes) if s == name) for cue in ("shape", "texture")]
            for name in sorted(set(shapes))
        }
        self._bias = {name: 100 * a / (a + b) for name, (a, b) in counts.items() if a + b}
        shape, texture = (100 * followed.count(cue) / len(shapes) for cue in ("shape", "texture"))
        model.details[self.name] = {
            "images": len(shapes),
            "penalty of the probe, chosen on training images": penalty,
            "decisions for shape and texture, by shape": counts,
        }
        bias = 100 * shape / (shape + texture) if shape + texture else float("nan")
        return {"shape bias": bias, "as shape": shape, "as texture": texture}

    def _pairs(self, data: Data, seed: int) -> tuple[Int[Tensor, "n 2"], list[str], list[str]]:
        """Positions of test images of different classes, and the names of these."""
        labels = data.labels("test")
        order = permutation(seed, 0, len(labels))
        order = order[labels[order] >= 0]
        pairs = torch.stack([order, order.roll(1)], dim=1)
        pairs = pairs[labels[pairs[:, 0]] != labels[pairs[:, 1]]][: self.images]
        if not len(pairs):
            raise UserError("shape_bias: the test images are all of one class, so no two disagree")
        shapes, textures = ([data.class_names[y] for y in labels[column]] for column in pairs.T)
        return pairs, shapes, textures

    def _mixed(self, data: Data, view: View, one: int, other: int) -> Float[Tensor, "3 size size"]:
        plain = replace(view, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        images = [apply_one(plain, data.image("test", i), 0, 0, i, 0) for i in (one, other)]
        mixed = phases_and_amplitudes(*images)
        mean, std = (torch.tensor(v)[:, None, None] for v in (view.mean, view.std))
        return (mixed - mean) / std

    def chance(self, data: Data) -> Metrics:
        return {"shape bias": 50.0}

    def figures(self) -> dict[str, "Figure"]:
        from sslbook.notebook import style

        order = sorted(self._bias, key=lambda name: self._bias[name])
        if not order:
            return {}
        alt = (
            f"Shape bias by category, from {self._bias[order[0]]:.0f} % ({order[0]}) to {self._bias[order[-1]]:.0f} %."
        )
        figure, ax = style.figure(alt=alt, caption=None, height=0.9 + 0.3 * len(order))
        ax.barh(order, [self._bias[name] for name in order])
        ax.axvline(50, color=style.GRAY, linestyle=":")
        ax.set_xlim(0, 100)
        ax.set_xlabel("classified as shape, % of shape or texture")
        return {"categories": figure}


def conflicts(folder: Path) -> tuple[list[Path], list[str], list[str]]:
    """The images in a folder whose shape and texture differ, and the names of both, in lower case.

    Raises:
        UserError: there are none, or a name says no shape and texture.
    """
    folder = Path(folder).expanduser()
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    found: list[Any] = [(path, NAME.match(path.stem.lower())) for path in paths]
    if wrong := [path for path, match in found if match is None]:
        raise UserError(f"{wrong[0]}: its name does not say shape and texture: name it as airplane1-bicycle2.png")
    kept = [(path, match["shape"], match["texture"]) for path, match in found if match["shape"] != match["texture"]]
    if not kept:
        raise UserError(
            f"--folder {folder}: no images in which shape and texture differ, such as airplane1-bicycle2.png"
        )
    columns = tuple(zip(*kept))
    return list(columns[0]), list(columns[1]), list(columns[2])


def categories(wanted: set[str], data: Data) -> dict[str, list[int]]:
    """The class numbers that make up each category: the classes of these names, or ImageNet's.

    Raises:
        UserError: the data have no such classes.
    """
    named = {name.lower(): [i] for i, name in enumerate(data.class_names)}
    if wanted <= set(named):
        return {name: named[name] for name in sorted(wanted)}
    if data.num_classes == 1000 and wanted <= set(IMAGENET):
        return {name: [i for a, b in runs for i in range(a, b + 1)] for name, runs in IMAGENET.items()}
    missing = sorted(wanted - set(named))
    raise UserError(
        f"the conflicting images show {', '.join(missing[:3])}, which are no classes of {data.name}: "
        "train the probe on images with these classes, or on ImageNet"
    )


def decide(classifier: linear.Classifier, x: Float[Tensor, "n dim"], members: list[list[int]]) -> Int[Tensor, "n"]:
    """The category with the largest mean probability over its classes."""
    log = classifier.log_probabilities(x)
    columns = {int(label): log[:, i] for i, label in enumerate(classifier.classes)}
    never = torch.full((len(x),), -torch.inf, dtype=log.dtype)
    scores = [
        torch.stack([columns.get(c, never) for c in classes]).logsumexp(0) - torch.tensor(len(classes)).log()
        for classes in members
    ]
    return torch.stack(scores, dim=1).argmax(dim=1)


def phases_and_amplitudes(
    shape: Float[Tensor, "3 height width"], texture: Float[Tensor, "3 height width"]
) -> Float[Tensor, "3 height width"]:
    """An image with the phases of one and the amplitudes of the other, clipped to [0, 1]."""
    one, other = (torch.fft.rfft2(image) for image in (shape, texture))
    return torch.fft.irfft2(torch.polar(other.abs(), one.angle()), s=shape.shape[1:]).clamp(0, 1)
