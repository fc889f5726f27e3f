"""A measure of collapse that methods log."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sslbook import distributed


@torch.no_grad()
def feature_std(z: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Mean standard deviation of the normalized features' coordinates, times sqrt(dim), over all processes.

    0 if all features are the same (collapse), about 1 if they are uniform on the sphere, where a coordinate's standard
    deviation is 1 / sqrt(dim). SimSiam (arXiv:2011.10566), section 4.1, plots it without the factor.
    """
    z = F.normalize(distributed.all_gather(z.float()), dim=1)
    return z.std(dim=0, correction=0).mean() * z.shape[1] ** 0.5
