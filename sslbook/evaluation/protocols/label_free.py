"""Measures without labels: how many directions the features use, how their variances decay, how views agree.

They are computed on training images and tell of collapse, and within one family of methods they follow the accuracy.
Across methods they do not: random weights or pixels may well score "better". The equations stand in `sslbook.nn.metrics`.

- RankMe (Garrido et al., 2023, equation 1), the effective rank of the features;
- alpha-ReQ (Agrawal et al., 2022, section 3), the exponent by which the covariance's eigenvalues decay;
- LiDAR (Thilak et al., 2023, section 4), the effective rank of the directions in which images differ more than their
  views; as the paper does for joint embeddings, each image has several views;
- alignment and uniformity (Wang and Isola, 2020, section 4.1), of two of these views, and of the images;
- feature std (SimSiam, section 4.1), 1 for features uniform on the sphere;
- linear CKA (Kornblith et al., 2019, section 3) with the same network at random weights, or with another model: 1 if both
  see the same.

The views are SimCLR's. The papers apply RankMe, alpha-ReQ and LiDAR to the projector's output as well; here it is the
backbone's.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.data.loader import Data
from sslbook.data.views import SIMCLR
from sslbook.errors import UserError, at_least_one
from sslbook.evaluation.base import Metrics, Protocol, Representation
from sslbook.evaluation.features import center_view, extract_views, some_of
from sslbook.nn import metrics
from sslbook.nn.backbones import build, describe
from sslbook.rng import permutation
from sslbook.weights.backbone import load_backbone

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNIFORMITY = 5000  # images of which all pairs are compared


class LabelFree(Protocol):
    """RankMe, alpha-ReQ, LiDAR, alignment, uniformity, feature std, CKA: all without labels.

    Args:
        images: training images at most, chosen at random; 25,600 as in RankMe's paper.
        view_images: of how many of them several views are compared.
        num_views: views of each of these, for LiDAR.
        against: another model for CKA: a run folder, an exported backbone or a checkpoint; by default the same network
            with random weights.
    """

    labels = False
    title = "Without labels (RankMe, LiDAR: effective ranks; no percentages)"
    digits = 2
    cost = "seconds, and a pass over VIEW_IMAGES x NUM_VIEWS views"

    def __init__(
        self, images: int = 25_600, view_images: int = 1000, num_views: int = 10, against: str | None = None
    ) -> None:
        at_least_one(images=images, view_images=view_images)
        if num_views < 2:
            raise UserError(f"num_views is {num_views}: give 2 or more, since views are compared")
        self.images, self.view_images, self.num_views, self.against = images, view_images, num_views, against
        self._spectrum = torch.empty(0)

    def run(self, model: Representation, data: Data) -> Metrics:
        few = some_of(data, self.images, model.seed)
        if few is not data:
            model = replace(model, data=few, _features={})
        other = self._other(model)  # what cannot be loaded is reported before the work
        x = model.features("train").x
        variances = metrics.singular_values(x, center=True).square() / len(x)
        self._spectrum = variances[variances > 1e-12 * variances[0]]
        views = (replace(SIMCLR, size=model.view.size, mean=model.view.mean, std=model.view.std),) * self.num_views
        options = {"seed": model.seed, "device": model.device, "batch_size": model.batch_size}
        z = extract_views(model.backbone, few, views, self.view_images, **options)
        found = {
            "RankMe": metrics.rank_me(x),
            "alpha-ReQ": metrics.decay_exponent(variances),
            "LiDAR": metrics.lidar(z),
            "alignment": metrics.alignment(z[:, 0], z[:, 1]),
            "uniformity": metrics.uniformity(x[permutation(model.seed, 1, len(x))[:UNIFORMITY]]),
            "feature std": float(metrics.feature_std(x)),
        }
        if other is not None:
            if not torch.equal(other.features("train").index, model.features("train").index):
                raise UserError(f"{self.against}: could not read the same images; check them")
            name = "random weights" if self.against is None else self.against.rstrip("/").rpartition("/")[2]
            found[f"CKA with {name}"] = metrics.cka(x, other.features("train").x)
        model.details[self.name] = {
            "images": len(x),
            "width of the features": x.shape[1],
            "images with views": len(z),
            "variances": [float(f"{v:.4g}") for v in self._spectrum[:256]],
        }
        return found

    def _other(self, model: Representation) -> Representation | None:
        """The model to compare with; None where nobody can build it."""
        if self.against is not None:
            backbone, facts = load_backbone(self.against)
            view = facts.get("view")
            own = model.view if view is None else center_view(view["size"], tuple(view["mean"]), tuple(view["std"]))
            return replace(model, backbone=backbone, view=own, _features={})
        description = describe(model.backbone)
        if description["init_args"] is None:
            return None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(model.seed + 1)  # another start than that of the control with random weights
            backbone: nn.Module = build(description)
        return replace(model, backbone=backbone, _features={})

    def figures(self) -> dict[str, "Figure"]:
        return {"spectrum": spectrum_figure(self._spectrum)} if len(self._spectrum) > 2 else {}


def spectrum_figure(variances: Float[Tensor, "components"]) -> "Figure":
    """The variances of the principal components, descending, on two logarithmic axes."""
    from sslbook.notebook import style

    share = variances / variances.sum()
    half = int((share.cumsum(0) < 0.5).sum()) + 1
    alt = (
        f"Variance of {len(share)} principal components of the features, descending from {share[0]:.2g} to "
        f"{share[-1]:.2g} of the total; {half} hold half of it."
    )
    figure, ax = style.figure(alt=alt, caption=None)
    ax.loglog(range(1, len(share) + 1), share)
    ax.axvline(half, color=style.GRAY, linestyle=":")
    ax.text(half, float(share.max()), f" half of the variance: {half}", va="top")
    ax.set_xlabel("principal component")
    ax.set_ylabel("fraction of the variance")
    return figure
