"""Measures of features that need no labels: of collapse, rank, spectrum, and of how two sets of features agree.

All are computed in float64 where it matters, and read their rows in chunks.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sslbook import distributed

ROWS = 2**13  # at a time, in float64


@torch.no_grad()
def feature_std(z: Float[Tensor, "n dim"]) -> Float[Tensor, ""]:
    """Mean standard deviation of the normalized features' coordinates, times sqrt(dim), over all processes.

    0 if all features are the same (collapse), about 1 if they are uniform on the sphere, where a coordinate's standard
    deviation is 1 / sqrt(dim). SimSiam (arXiv:2011.10566), section 4.1, plots it without the factor.
    """
    return distributed.all_reduce_std(F.normalize(z.float(), dim=1)).mean() * z.shape[1] ** 0.5


@torch.no_grad()
def singular_values(x: Float[Tensor, "n dim"], center: bool = False) -> Float[Tensor, "rank"]:
    """The min(n, dim) singular values of the features, descending, in float64 on the CPU.

    They are roots of the eigenvalues of the smaller of X^T X and X X^T, summed in chunks: a relative error of 1e-8.

    Args:
        x: the features.
        center: subtract their mean first; the squares are then n times the variances of the principal components.
    """
    mean = x.mean(dim=0, dtype=torch.float64, keepdim=True).cpu() if center else 0.0
    if len(x) < x.shape[1]:
        rows = x.cpu().double() - mean
        gram = rows @ rows.T
    else:
        gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        for part in x.split(ROWS):
            part = part.cpu().double() - mean
            gram += part.T @ part
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()


def effective_rank(values: Float[Tensor, "n"], epsilon: float = 1e-7) -> float:
    """exp of the entropy of p = values / sum(values) + epsilon (Roy and Vetterli, 2007); 0 where all are 0."""
    total = values.double().sum()
    if not total > 0:
        return 0.0
    p = values.double() / total + epsilon
    return float((-p * p.log()).sum().exp())


def rank_me(x: Float[Tensor, "n dim"]) -> float:
    """RankMe: the effective rank of the features, from 1 (all on a line) to min(n, dim).

    Garrido et al. (2023, "RankMe: Assessing the downstream performance of pretrained self-supervised representations by
    their rank"), equation 1: exp(-sum_k p_k log p_k) with p_k = sigma_k / sum_j sigma_j + 1e-7 and the singular values
    sigma of the features, which are not centered.
    """
    return effective_rank(singular_values(x))


def alpha_req(x: Float[Tensor, "n dim"]) -> float:
    """alpha-ReQ: the exponent alpha of the decay lambda_i ~ i^-alpha of the covariance's eigenvalues; see below.

    Agrawal et al. (2022, "alpha-ReQ: Assessing representation quality in self-supervised learning by measuring
    eigenspectrum decay"), section 3. Good representations were near 1; below it the tail is heavy.
    """
    return decay_exponent(singular_values(x, center=True).square())


def decay_exponent(values: Float[Tensor, "n"], first: int = 4, last: int = 100) -> float:
    """The negative slope of log values over log i, fitted with weights 1 / i, as in Stringer et al. (2019).

    Args:
        values: descending; those below 1e-12 of the first count as 0. Fewer than three others: nan.
        first: number of the first value of the fit; of a short spectrum it is 1.
        last: number of its last.
    """
    values = values[values > 1e-12 * values[0]][:last].double()
    number = torch.arange(1, len(values) + 1, dtype=torch.float64)
    keep = number >= (first if len(values) >= first + 3 else 1)
    number, values = number[keep], values[keep]
    if len(values) < 3:
        return math.nan
    weight = 1 / number
    u, v = number.log(), values.log()
    u, v = u - (weight * u).sum() / weight.sum(), v - (weight * v).sum() / weight.sum()
    return -float((weight * u * v).sum() / (weight * u * u).sum())


def lidar(views: Float[Tensor, "images views dim"], delta: float = 1e-4) -> float:
    """LiDAR: the effective rank of linear discriminant analysis with every image as a class and its views as samples.

    Thilak et al. (2023, "LiDAR: Sensing linear probing performance in joint embedding SSL architectures"), section 4:
    the entropy of the eigenvalues of Sigma_w^(-1/2) Sigma_b Sigma_w^(-1/2), where Sigma_b is the covariance of the
    images' means, Sigma_w that of the views around them plus delta I, and p = lambda / sum(lambda) + 1e-7. RankMe counts
    the directions in which features vary; this one only those in which images differ more than their views.

    Args:
        views: features of several augmented views of every image.
        delta: added to the within-class covariance.
    """
    x = views.detach().cpu().double()
    images, count, dim = x.shape
    means = x.mean(dim=1)
    within = delta * torch.eye(dim, dtype=torch.float64)
    for part, mean in zip(x.split(ROWS // count + 1), means.split(ROWS // count + 1)):
        around = (part - mean[:, None]).flatten(0, 1)
        within += around.T @ around / (images * count)
    between = (means - means.mean(dim=0)).T / images**0.5  # of which the square is Sigma_b
    # Sigma_w = L L^T, and the eigenvalues are the squared singular values of L^-1 between.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), between, upper=False)
    return effective_rank(singular_values(whitened.T).square())


@torch.no_grad()
def alignment(x: Float[Tensor, "n dim"], y: Float[Tensor, "n dim"]) -> float:
    """Mean squared distance of two views' normalized features: 0 if they are equal, 2 if they are orthogonal.

    Wang and Isola (2020, "Understanding contrastive representation learning through alignment and uniformity on the
    hypersphere"), section 4.1, with exponent 2.
    """
    return float((F.normalize(x.float(), dim=1) - F.normalize(y.float(), dim=1)).square().sum(dim=1).double().mean())


@torch.no_grad()
def uniformity(x: Float[Tensor, "n dim"], t: float = 2.0) -> float:
    """log E exp(-t |z_i - z_j|^2) over pairs of different rows, normalized: 0 if all are equal, down to about -2 t.

    Wang and Isola (2020), section 4.1. A single row has no pairs: nan.
    """
    z = F.normalize(x.float(), dim=1)
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(z), ROWS):
        rows = z[start : start + ROWS]
        for columns in z.split(ROWS):
            total += (-t * (2 - 2 * rows @ columns.T).clamp(min=0)).exp().sum(dtype=torch.float64).cpu()
    pairs = len(z) * (len(z) - 1)
    return math.log(max((float(total) - len(z)) / pairs, 1e-300)) if pairs else math.nan


@torch.no_grad()
def cka(x: Float[Tensor, "n dim_x"], y: Float[Tensor, "n dim_y"]) -> float:
    """Linear centered kernel alignment of two sets of features of the same images, from 0 to 1 (equal but for rotation).

    Kornblith et al. (2019, "Similarity of neural network representations revisited"), section 3: with centered features
    |Y^T X|^2 / (|X^T X| |Y^T Y|), Frobenius norms. nan where one set does not vary.
    """

    def product(a: Tensor, b: Tensor) -> float:
        means = [v.mean(dim=0, dtype=torch.float64).cpu() for v in (a, b)]
        total = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64)
        for rows, columns in zip(a.split(ROWS), b.split(ROWS)):
            total += (rows.cpu().double() - means[0]).T @ (columns.cpu().double() - means[1])
        return float(total.square().sum())

    norm = math.sqrt(product(x, x) * product(y, y))
    return product(x, y) / norm if norm > 0 else math.nan
