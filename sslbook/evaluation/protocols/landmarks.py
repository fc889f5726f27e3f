"""Retrieval of landmarks: ROxford and RParis, by cosine similarity of frozen features.

Radenovic et al. (2018, "Revisiting Oxford and Paris: Large-scale image retrieval benchmarking"): a query is the region of
an image, and each image of the database is easy, hard, unclear ("junk") or negative for it. In the setup Easy the easy
images are positives, in Medium the easy and the hard, in Hard the hard alone; the others of them, and the unclear, are
removed from the ranking. Reported are mAP and mP@k of each setup, as in section 3 there.

The folder is the authors': FOLDER/jpg/NAME.jpg, and FOLDER/gnd_roxford5k.pkl (or .json with the same content): `imlist`,
`qimlist`, and for each query `bbx`, `easy`, `hard`, `junk`. A pickle may hold only lists, dictionaries, texts, numbers and
arrays of numbers; anything else in it is refused and not executed.

Images keep their shape: the longer side is resized to `size`, both are cut to multiples of 32 pixels, and one image is
taken at a time. The authors' own methods use several sizes, learned whitening and 1,024 pixels.
"""

import json
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook.data.images import open_image
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError, at_least_one, explained
from sslbook.evaluation.base import Metrics, Protocol, Representation
from sslbook.evaluation.features import extract_files
from sslbook.files import Whole, check

SETUPS = {  # positives, and what is removed besides the unclear images
    "Easy": (("easy",), ("hard",)),
    "Medium": (("easy", "hard"), ()),
    "Hard": (("hard",), ("easy",)),
}
MULTIPLE = 32
SAFE = {  # what a pickle may name: arrays of numbers
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *((module, "bytes") for module in ("builtins", "__builtin__")),
    ("_codecs", "encode"),
}


class Landmarks(Protocol):
    """mAP and mP@k of queries for landmarks, in the setups Easy, Medium and Hard.

    Args:
        folder: with the images in jpg/ and a file gnd_NAME.pkl or gnd_NAME.json.
        size: pixels of an image's longer side.
        at: the numbers k of first images for mP@k.
    """

    labels = False
    uses_data = False
    title = "Landmarks: mAP and mP@k"
    cost = "a pass over the database, one image at a time"

    def __init__(self, folder: Path | None = None, size: int = 512, at: list[int] | None = None) -> None:
        self.folder, self.size = folder if folder is None else Path(folder).expanduser(), size
        self.at = [1, 5, 10] if at is None else at
        for k in self.at:
            at_least_one(at=k)
        if size < MULTIPLE:
            raise UserError(f"size is {size}: give at least {MULTIPLE}")

    def run(self, model: Representation, data: Data) -> Metrics:
        folder = self.folder or Path()
        database, queries, truth = read_truth(folder)
        whole = [(name, None) for name in database]
        regions = [(name, entry["bbx"]) for name, entry in zip(queries, truth)]
        x, q = (self._features(model, folder, images) for images in (whole, regions))
        order = (F.normalize(q, dim=1) @ F.normalize(x, dim=1).T).argsort(dim=1, descending=True, stable=True)
        metrics: Metrics = {}
        for setup, (positive, removed) in SETUPS.items():
            found = []
            for ranking, entry in zip(order, truth):
                wanted = [i for kind in positive for i in entry[kind]]
                if wanted:
                    out = [i for kind in ("junk", *removed) for i in entry[kind]]
                    found.append(scores(ranking, wanted, out, self.at))
            if found:
                values = torch.tensor(found, dtype=torch.float64).mean(dim=0).tolist()
                metrics |= {f"{setup}, {name}": v for name, v in zip(["mAP", *(f"mP@{k}" for k in self.at)], values)}
        if not metrics:
            raise UserError(f"{folder}: no query has an easy or a hard image: nothing can be measured")
        model.details[self.name] = {"database": len(database), "queries": len(queries), "longer side": self.size}
        return metrics

    def _features(
        self, model: Representation, folder: Path, images: list[tuple[str, Any]]
    ) -> Float[Tensor, "images dim"]:
        def load(i: int) -> Tensor:
            name, region = images[i]
            return prepared(open_image(folder / "jpg" / f"{name}.jpg"), region, self.size, model.view)

        options = {"device": model.device, "batch_size": 1, "progress": model.progress}
        what = f"landmarks: {type(model.backbone).__name__} does not take images of any shape"
        with explained(what, RuntimeError, ValueError, AssertionError, cure="use a network that does"):
            return extract_files(model.backbone, len(images), load, **options)

    def lacks(self, backbone: nn.Module, data: Data) -> str | None:
        if self.folder is None:
            return "--folder FOLDER, with images in jpg/ and gnd_NAME.pkl or gnd_NAME.json"
        if isinstance(backbone, nn.Flatten):
            return "features of one width for images of any shape"
        return super().lacks(backbone, data)


def prepared(image: Any, region: Any, size: int, view: View) -> Float[Tensor, "3 height width"]:
    """The region of a PIL image (left, top, right, bottom; None: all of it), resized and normalized.

    Raises:
        UserError: the region is empty or outside the image.
    """
    from torchvision.transforms.v2.functional import normalize, pil_to_tensor

    if region is not None:
        left, top, right, bottom = (round(float(v)) for v in region)
        if not (left < right and top < bottom and left < image.width and top < image.height and min(right, bottom) > 0):
            raise UserError(f"the region {list(region)} of a query lies outside its {image.width}x{image.height} image")
        image = image.crop((left, top, right, bottom))
    scale = size / max(image.size)
    sides = [max(MULTIPLE, round(side * scale) // MULTIPLE * MULTIPLE) for side in image.size]
    from PIL import Image

    x = pil_to_tensor(image.resize(sides, Image.Resampling.BICUBIC)).float() / 255
    return normalize(x, list(view.mean), list(view.std))


def scores(ranking: Int[Tensor, "n"], positive: list[int], removed: list[int], at: list[int]) -> list[float]:
    """Average precision and precision at k of one query, in percent.

    As in the authors' code: the area under precision over recall by the trapezoidal rule, and of k the first ranks that
    hold the last positive at most.
    """
    kept = ranking[~torch.isin(ranking, torch.tensor(removed, dtype=ranking.dtype))]
    places = torch.isin(kept, torch.tensor(positive, dtype=ranking.dtype)).nonzero()[:, 0].tolist()
    before = [hits / place if place else 1.0 for hits, place in enumerate(places)]
    after = [(hits + 1) / (place + 1) for hits, place in enumerate(places)]
    precision = sum(a + b for a, b in zip(before, after)) / (2 * len(positive))
    last = max(places) + 1 if places else 0
    at_k = [sum(place < min(last, k) for place in places) / max(min(last, k), 1) for k in at]
    return [100 * precision, *(100 * value for value in at_k)]


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in SAFE:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no list, number or array")
        return super().find_class(module.replace("numpy.core.", "numpy._core."), name)


def read_truth(folder: Path) -> tuple[list[str], list[str], list[dict[str, Any]]]:
    """Names of the database, names of the queries, and for each query `bbx` and the numbers of its images by kind.

    Raises:
        UserError: there is no such file, it is not readable, or an entry of it is wrong; names it.
    """
    files = sorted([*folder.glob("gnd_*.json"), *folder.glob("gnd_*.pkl")])
    if not files:
        raise UserError(f"--folder {folder}: no gnd_*.pkl or gnd_*.json; give the folder of ROxford or RParis")
    file = files[0]
    with explained(f"{file}: not readable", Exception, cure="download it again"):  # a forged pickle raises anything
        with open(file, "rb") as stream:
            content = json.load(stream) if file.suffix == ".json" else _Restricted(stream).load()
        content = json.loads(json.dumps(content, default=lambda array: array.tolist()))  # numpy's numbers as plain ones
    check(file, content, {"imlist": [str], "qimlist": [str]})
    database, queries = content["imlist"], content["qimlist"]
    numbers = [Whole(0, len(database) - 1)]
    kinds = {"easy": numbers, "hard": numbers, "junk": numbers}
    truth = check(file, content, {"gnd": [{"bbx": [float], **kinds}]})["gnd"]
    if len(truth) != len(queries):
        raise UserError(f"{file}: gnd has {len(truth)} entries for {len(queries)} queries")
    for number, box in enumerate(entry["bbx"] for entry in truth):
        if len(box) != 4 or not (box[0] < box[2] and box[1] < box[3]):
            raise UserError(f"{file}: gnd[{number}].bbx is {box}; it must be left, top, right, bottom")
    return database, queries, [{key: entry[key] for key in ("bbx", *kinds)} for entry in truth]
