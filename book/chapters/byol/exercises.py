"""The exercises of the chapter *BYOL*."""

import math

import torch
import torch.nn.functional as F

from sslbook.notebook.exercises import exercise


def _unit(x):
    return F.normalize(x, dim=1)


@exercise(
    inputs=lambda r: [(2 * r.normal(6, 5), 3 * r.normal(6, 5)), (r.normal(4, 3), r.normal(4, 3))],
    returns={"loss": "the mean over the rows is one number"},
    gradient=True,
    mistakes={
        "the gradient flows into the target: detach z": {"stop": lambda z: z},
        "the gradient is stopped on the wrong side: p learns, z is the constant": lambda p, z: byol_loss.solution(z, p),
        "the rows are not of unit length: divide each by its norm first": {"unit": lambda x: x},
        "the columns are normalized: each row is one image, dim=1": {"unit": lambda x: F.normalize(x, dim=0)},
        "the distance: square it": lambda p, z: (_unit(p) - _unit(z.detach())).norm(dim=1).mean(),
        "the sign: it is 2 - 2 cos": lambda p, z: 4 - byol_loss.solution(p, z),
        "the sum over the rows: take the mean": lambda p, z: len(p) * byol_loss.solution(p, z),
        "the mean over all entries: sum the squares of a row, then take the mean over rows": lambda p, z: (
            byol_loss.solution(p, z) / p.shape[1]
        ),
        "1 - cos is half of the squared distance": lambda p, z: byol_loss.solution(p, z) / 2,
        "this is minus the cosine, SimSiam's loss: the squared distance is 2 - 2 cos": lambda p, z: (
            byol_loss.solution(p, z) / 2 - 1
        ),
    },
)
def byol_loss(p, z, *, unit=_unit, stop=lambda z: z.detach()):
    """`(p, z) -> loss`: mean squared distance of the normalized rows; no gradient for z."""
    return (unit(p) - unit(stop(z))).square().sum(1).mean()


@exercise(
    inputs=lambda r: [(0.9,), (0.996,), (0.5,)],
    returns={"steps": "a number of steps"},
    mistakes={
        "this is the mean age m / (1 - m): half of the weight is gone earlier": lambda m: m / (1 - m),
        "1 / (1 - m) is where a fraction 1/e is left, nearly: solve m^t = 1/2": lambda m: 1 / (1 - m),
        "this is the approximation for m near 1: solve m^t = 1/2": lambda m: math.log(2) / (1 - m),
        "not rounded: return the number itself": lambda m: math.ceil(half_life.solution(m)),
        "the sign is wrong: log m is negative": lambda m: -half_life.solution(m),
        "m and 1 - m are exchanged: what is kept is m": {"kept": lambda m: 1 - m},
        "the ratio is upside down: t = log(1/2) / log m": lambda m: 1 / half_life.solution(m),
    },
)
def half_life(m, *, kept=lambda m: m):
    """`(m) -> steps` after which half of an old target network is left, with EMA momentum m."""
    return math.log(0.5) / math.log(kept(m))


@exercise(
    inputs=lambda r: [(r.normal(60, n), r.normal(60, n) @ r.normal(n, 3) + 2 + r.normal(60, 3)) for n in (2, 4)],
    returns={"unexplained variance": "one number: the sum over the target's entries"},
    mistakes={
        "this is the variance that is explained: subtract it from the target's": lambda z, t: (
            (t - t.mean(0)).square().sum(1).mean() - unexplained.solution(z, t)
        ),
        "this is the target's whole variance, which constant features leave": lambda z, t: (
            (t - t.mean(0)).square().sum(1).mean()
        ),
        "the means are not subtracted: a predictor may add a constant": [
            {"center": lambda x: x},
            lambda z, t: unexplained.solution(z, t) + t.mean(0).square().sum(),
        ],
        "the mean over images divides by their number, not by one less": lambda z, t: (
            unexplained.solution(z, t) * len(z) / (len(z) - 1)
        ),
        "the root of it: the mean squared error is wanted": lambda z, t: unexplained.solution(z, t) ** 0.5,
        "z is predicted from the target: it must be the other way round": lambda z, t: unexplained.solution(t, z),
        "the mean over the target's entries: sum them": lambda z, t: unexplained.solution(z, t) / t.shape[1],
        "the sum over images: take the mean": lambda z, t: len(z) * unexplained.solution(z, t),
        "this is the fraction: multiply by the target's variance": lambda z, t: (
            unexplained.solution(z, t) / (t - t.mean(0)).square().sum(1).mean()
        ),
    },
)
def unexplained(z, target, *, center=lambda x: x - x.mean(0)):
    """`(z, target) -> variance` that the best linear predictor leaves: the mean over images, summed over entries."""
    z, target = center(z.double()), center(target.double())
    return (target - z @ torch.linalg.lstsq(z, target).solution).square().sum(1).mean()


@exercise(
    inputs=lambda r: [(1.0, 0.6, 0.05), (0.5, 0.3, 0.02), (0.8, 0.1, 0.1)],
    returns={"threshold": "the smaller root", "stable value": "the larger root"},
    mistakes={
        "exchanged: the threshold is the smaller root": lambda *a: fixed_points.solution(*a)[::-1],
        "the coefficient of the square is lam + sigma2, not 1": {"square": lambda lam, sigma2: 1.0},
        "the coefficient of the square is lam + sigma2, not 1 + sigma2": {"square": lambda lam, sigma2: 1 + sigma2},
        "the sign under the root is wrong: lam^2 - 4 eta (lam + sigma2)": {"sign": 1},
        "the factor 4 under the root is missing": {"four": 1},
        "divided by lam + sigma2: the formula has twice that": {"two": 1},
        "zero is left out: the threshold is the smaller of the other two": lambda *a: (
            0.0,
            fixed_points.solution(*a)[1],
        ),
    },
)
def fixed_points(lam, sigma2, eta, *, square=lambda lam, sigma2: lam + sigma2, sign=-1, four=4, two=2):
    """`(lam, sigma2, eta) -> (threshold, stable value)` of the predictor's eigenvalue."""
    a = square(lam, sigma2)
    root = math.sqrt(abs(lam**2 + sign * four * eta * a))
    return (lam - root) / (two * a), (lam + root) / (two * a)


@exercise(
    inputs=lambda r: [(torch.tensor([1.0, 0.5, 0.2, 0.1, 0.05]), 0.3, eta) for eta in (0.01, 0.04, 0.1)],
    returns={"surviving modes": "a number"},
    mistakes={
        "these are the modes that die": {"alive": lambda critical, eta: critical <= eta},
        "lam is not squared: the threshold is lam^2 / (4 (lam + sigma2))": {"power": 1},
        "the factor 4 is missing": {"four": 1},
        "this is the optimal predictor's value, lam / (lam + sigma2): the threshold is lam / 4 times that": (
            lambda lam, sigma2, eta: (lam / (lam + sigma2) > eta).sum()
        ),
        "which ones is not asked: count them": lambda lam, sigma2, eta: lam**2 / (4 * (lam + sigma2)) > eta,
        "a fraction: count them": lambda lam, sigma2, eta: survivors.solution(lam, sigma2, eta) / len(lam),
        "the noise is missing in the denominator": lambda lam, sigma2, eta: survivors.solution(lam, 0.0, eta),
    },
)
def survivors(lam, sigma2, eta, *, power=2, four=4, alive=lambda critical, eta: critical > eta):
    """`(lam, sigma2, eta) -> number` of modes that have a stable value besides zero."""
    return alive(lam**power / (four * (lam + sigma2)), eta).sum()


def _correlation(r, n):
    z = r.normal(40, n) @ r.normal(n, n)
    return z.T @ z / 40


@exercise(
    inputs=lambda r: [(_correlation(r, 4), 0.1), (_correlation(r, 3), 0.0), (_correlation(r, 5), 0.3)],
    returns={"predictor": "the shape of C"},
    mistakes={
        "the eigenvalues themselves: take their roots": {"root": lambda c: c},
        "the root of every entry: take the root of the eigenvalues": lambda C, boost: (
            C.abs().sqrt() * C.sign() + boost * torch.linalg.eigvalsh(C).max().sqrt() * torch.eye(len(C))
        ),
        "the boost is missing": {"by": lambda boost, root: 0.0},
        "the boost is relative: multiply it by the largest root": {"by": lambda boost, root: boost},
        "the boost is relative to the largest root, not to the mean": {"by": lambda boost, root: boost * root.mean()},
        "the boost times the largest eigenvalue, as in the paper: here it is times the largest root": {
            "by": lambda boost, root: boost * root.max() ** 2
        },
        "eigh sorts upwards: the largest root is the last": {"by": lambda boost, root: boost * root[0]},
        "the boost is added to the eigenvalues, not to every entry": lambda C, boost: (
            direct_predictor.solution(C, 0.0) + boost * torch.linalg.eigvalsh(C.double()).max().sqrt()
        ),
        "one rotation is missing: U diag U'": {"back": lambda U, d: U @ torch.diag(d)},
        "the Cholesky factor is another root of C: the predictor is symmetric": lambda C, boost: (
            torch.linalg.cholesky(C.double())
            + boost * torch.linalg.eigvalsh(C.double()).max().sqrt() * torch.eye(len(C))
        ),
        "diagonal: rotate back with the eigenvectors": {"back": lambda U, d: torch.diag(d)},
        "U and its transpose are exchanged: the eigenvectors are the columns": {
            "back": lambda U, d: U.T @ torch.diag(d) @ U
        },
    },
)
def direct_predictor(C, boost, *, root=torch.sqrt, by=lambda boost, root: boost * root.max(), back=None):
    """`(C, boost) -> (d, d)`: the root of C, with `boost` times its largest eigenvalue added to all."""
    values, U = torch.linalg.eigh(C.double())
    d = root(values.clamp(min=0))
    return (back or (lambda U, d: U @ torch.diag(d) @ U.T))(U, d + by(boost, d))


@exercise(
    inputs=lambda r: [(a * torch.eye(n) + 0.3 * r.normal(n, n), _correlation(r, n)) for n, a in ((4, 0.3), (3, 1.0))],
    returns={"cosines": "one for each eigenvector, the largest eigenvalue first"},
    mistakes={
        "from the smallest eigenvalue: `eigh` sorts upwards": {"order": lambda U: U},
        "the eigenvectors are the columns of what `eigh` returns, not the rows": {"order": lambda U: U.flip(1).T},
        "a cosine has a sign: V may turn an eigenvector round": lambda V, C: alignment.solution(V, C).abs(),
        "the cosine of columns, dim=0: each eigenvector is a column": lambda V, C: F.cosine_similarity(
            U := torch.linalg.eigh(C).eigenvectors.flip(1), V @ U, dim=1
        ),
        "the columns are in upward order, so flip columns: axis 1": {"order": lambda U: U.flip(0)},
        "this is u' V u: divide by the length of V u": {"length": lambda image: 1.0},
        "this is |V u|, how much V stretches: the cosine is wanted": lambda V, C: (
            V @ torch.linalg.eigh(C).eigenvectors.flip(1)
        ).norm(dim=0),
        "V is transposed": lambda V, C: alignment.solution(V.T, C),
        "these are the eigenvectors of V: take those of C": lambda V, C: alignment.solution(V, V + V.T),
    },
)
def alignment(V, C, *, order=lambda U: U.flip(1), length=lambda image: image.norm(dim=0)):
    """`(V, C) -> (d,)`: the cosine of every eigenvector u of C with V u, largest eigenvalue first."""
    U = order(torch.linalg.eigh(C.double()).eigenvectors)
    image = V.double() @ U
    return (U * image).sum(0) / length(image)


@exercise(
    inputs=lambda r: [(r.normal(30, 6) @ torch.diag(0.5 ** torch.arange(6.0)) + 3,), (r.normal(20, 4) - 1,)],
    returns={"effective rank": "one number, between 1 and the width"},
    mistakes={
        "the mean is not subtracted: a common direction counts as one": {"center": lambda x: x},
        "the mean of each dimension is subtracted, over the images": [
            {"center": lambda x: x - x.mean(1, keepdim=True)},
            {"center": lambda x: x - x.mean()},
        ],
        "this is the participation ratio, another count of directions": lambda x: (
            (s := torch.linalg.svdvals(x - x.mean(0))).sum() ** 2 / s.square().sum()
        ),
        "divided by the largest: normalize to the sum 1": {"total": torch.max},
        "a softmax of the singular values: divide them by their sum": lambda x: (
            torch.special.entr(torch.linalg.svdvals(x - x.mean(0)).softmax(0)).sum().exp()
        ),
        "the squares of the singular values: this is the rank of the variances": {"power": 2},
        "this is the entropy: take its exponential": {"last": lambda h: h},
        "the entropy is in bits: take natural logarithms, or 2 to its power": {
            "last": lambda h: (h / math.log(2)).exp()
        },
        "the singular values are not normalized: divide by their sum": {"total": lambda s: s.square().sum().sqrt()},
        "the number of nonzero singular values: weigh them by their size": lambda x: float(x.shape[1]),
    },
)
def effective_rank(x, *, center=lambda x: x - x.mean(0), power=1, total=torch.sum, last=torch.exp):
    """`(x) -> rank`: the exponential of the entropy of the normalized singular values of the centered rows."""
    s = torch.linalg.svdvals(center(x.double())) ** power
    return last(torch.special.entr(s / total(s)).sum())
