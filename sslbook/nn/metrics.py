"""Whether a network still says different things of different images."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sslbook import distributed


@torch.no_grad()
def feature_std(z: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """How far apart the normalized rows of all processes lie: 0 if all are the same, about 1 on the whole sphere.

    The deviation of a coordinate is 1 / sqrt(dim) for directions without preference (SimSiam, arXiv:2011.10566,
    section 4.1), hence the factor.
    """
    z = F.normalize(distributed.all_gather(z.float()), dim=1)
    return z.std(dim=0, correction=0).mean() * z.shape[1] ** 0.5
