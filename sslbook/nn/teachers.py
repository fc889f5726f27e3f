"""Frozen networks as teachers: features of every patch of an image, the targets of MILAN, EVA and VQ-KD.

A teacher is any network with a feature map, or one whose result is a map `(n, dim, rows, columns)`. It is never trained,
and stays in evaluation mode. `sslbook.weights.teachers` opens teachers by name.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.nn.frozen import Frozen, Normalization


class TeacherFeatures(NamedTuple):
    """A teacher's features of images."""

    patches: Float[Tensor, "batch patches dim"]
    attention: Float[Tensor, "batch patches"]
    """weights of the patches; they sum to 1"""
    cls: Float[Tensor, "batch dim"] | None
    """the class token's feature, where there is one"""
    grid: tuple[int, int]


class Teacher(Frozen):
    """A frozen network for a student's images, renormalized and resized.

    The attention is that of the class token in the last block, averaged over heads. A network without a class token is
    read by its average pooling: a patch weighs as much as it contributes to the length of the mean feature.

    Args:
        model: the network; it has `forward_map`, or its result is a map.
        view: size and normalization of the student's images.
        size: side in pixels of the teacher's images; null leaves them as they are.
        normalization: mean and standard deviation that the model wants; those of the view if left out.
        name: the model's name in messages.

    Raises:
        UserError: the model makes no feature map.
    """

    def __init__(
        self,
        model: nn.Module,
        view: View,
        size: int | None = None,
        normalization: Normalization | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(view, normalization, size)
        self.model, self.name = model.requires_grad_(False), name or type(model).__name__
        self.train(False)
        features = self(torch.zeros(1, 3, view.size, view.size, device=self.scale.device))
        self.grid, self.dim, self.has_cls = features.grid, features.patches.shape[2], features.cls is not None
        self.stride = (size or view.size) // self.grid[0]

    def require_grid(self, grid: tuple[int, int]) -> None:
        """Check that the student's patches are the teacher's.

        Raises:
            UserError: they are not; names both grids and the size of images that makes them equal.
        """
        if self.grid != grid:
            raise UserError(
                f"the teacher {self.name} has a grid of {self.grid[0]}x{self.grid[1]} patches and the student one of "
                f"{grid[0]}x{grid[1]}: give the teacher images of {grid[0] * self.stride} pixels "
                f"(--method.teacher_size {grid[0] * self.stride}), or choose another patch_size of the backbone"
            )

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> TeacherFeatures:
        """Features of every patch, and how much each counts; UserError if the teacher makes no feature map."""
        x, model = self.own_images(x), self.model
        if getattr(model, "cls_token", None) is not None and hasattr(model, "forward_attention"):
            of_tokens: Any = model
            tokens, attention = of_tokens.forward_attention(x)
            prefix, grid = of_tokens.num_prefix_tokens, (x.shape[2] // of_tokens.stride, x.shape[3] // of_tokens.stride)
            patches, cls = tokens[:, prefix:].float(), tokens[:, 0].float()
            return TeacherFeatures(patches, normalized(attention[:, prefix:].float()), cls, grid)
        make_map: Any = getattr(model, "forward_map", model)
        features = make_map(x)
        if not isinstance(features, Tensor) or features.ndim != 4:
            raise UserError(
                f"the teacher {self.name} makes no feature map (n, dim, rows, columns): "
                "give it a method forward_map that does, or choose another"
            )
        patches = features.flatten(2).mT.float()
        # Their sum is the number of patches times the squared length of the mean.
        contribution = (patches @ patches.mean(dim=1, keepdim=True).mT)[:, :, 0]
        return TeacherFeatures(patches, normalized(contribution.clamp_min(0)), None, tuple(features.shape[2:]))


def normalized(weights: Float[Tensor, "batch patches"]) -> Float[Tensor, "batch patches"]:
    """Weights that sum to 1 in every image; uniform where all are 0."""
    total = weights.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp_min(1e-12), 1 / weights.shape[1])
