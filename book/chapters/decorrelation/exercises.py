"""The exercises of the chapter *Decorrelation*."""

import torch

from sslbook.notebook.exercises import exercise


def _centered(z):
    return z - z.mean(0)


def _mixed(r, n, d):
    """Rows whose entries are correlated and have a mean."""
    return r.normal(n, d) @ (torch.eye(d) + 0.5 * r.normal(d, d)) + r.normal(d)


def _off_diagonal(c):
    return c - torch.diag(c.diagonal())


@exercise(
    inputs=lambda r: [(_mixed(r, 12, 4),), (_mixed(r, 7, 3),)],
    returns={"covariance loss": "one number"},
    gradient=True,
    mistakes={
        "the diagonal is still in it: variances are the variance term's business": {"keep": lambda c: c},
        "the mean is not subtracted: this is no covariance": {"center": lambda z: z},
        "divided by N: the covariance of a sample has N - 1": {"count": len},
        "these are correlations: VICReg does not divide by the standard deviations": lambda z: (
            _off_diagonal(torch.corrcoef(z.T)).square().sum() / z.shape[1]
        ),
        "this compares images: z z' is (N, N), and the covariance of dimensions is (d, d)": lambda z: (
            covariance_loss.solution(z.T) if len(z) > 1 else z.sum()
        ),
        "the sum of absolute values: square the covariances": {"power": 1},
        "each pair of dimensions stands in the sum twice, as (j, k) and as (k, j)": {"share": lambda d: 2 * d},
        "divided by N - 1 inside the square: it then counts twice": [
            lambda z: covariance_loss.solution(z) * (len(z) - 1),
            lambda z: covariance_loss.solution(z) * (len(z) - 1) ** 2,
        ],
        "the mean of each image is subtracted: subtract that of each dimension, over the batch": {
            "center": lambda z: z - z.mean(1, keepdim=True)
        },
        "the sum over all pairs: divide by the width d": {"share": lambda d: 1},
        "the mean over all entries: divide by d, not by its square": {"share": lambda d: d**2},
        "the mean over pairs: divide by d, not by d (d - 1)": {"share": lambda d: d * (d - 1)},
    },
)
def covariance_loss(z, *, center=_centered, count=lambda z: len(z) - 1, keep=_off_diagonal, power=2, share=lambda d: d):
    """`(z) -> loss`: the squared covariances of different dimensions, summed, divided by the width."""
    z = center(z)
    return (keep(z.T @ z / count(z)).abs() ** power).sum() / share(z.shape[1])


@exercise(
    inputs=lambda r: [(_mixed(r, 12, 4),), (_mixed(r, 7, 3),)],
    returns={"gradient": "the shape of z"},
    mistakes={
        "a factor of 2 is missing: every pair of dimensions stands in the sum twice": {"factor": 2},
        "the factor of the square and of both orders of a pair is missing: 2 times 2": {"factor": 1},
        "the diagonal is still in it": {"keep": lambda c: c},
        "z must be centered": {"center": lambda z: z},
        "the sign is reversed: a descent step subtracts this": {"factor": -4},
        "divided by N - 1 once too often: once in C, once in its derivative": {"times": 2},
        "the derivative of C by z brings one more 1 / (N - 1)": {"times": 0},
        "the width d is missing in the denominator": {"share": lambda d: 1},
    },
)
def covariance_gradient(z, *, factor=4, keep=_off_diagonal, center=None, times=1, share=lambda d: d):
    """`(z) -> (N, d)`: the gradient of the covariance loss."""
    n, d = z.shape
    y = _centered(z)
    return factor * (center or _centered)(z) @ keep(y.T @ y / (n - 1)) / (share(d) * (n - 1) ** times)


@exercise(
    inputs=lambda r: [(33, 5, 0.7), (128, 256, 1.0), (2048, 8192, 2.0)],
    returns={"expected loss": "one number"},
    mistakes={
        "a dimension has d - 1 others, not d": {"others": lambda d: d},
        "divided by N: the covariance of a sample has N - 1": {"count": lambda n: n},
        "sigma to the second power: a squared covariance has the square of two variances": {"power": 2},
        "sigma is missing": {"power": 0},
        "sigma to the third power: a squared covariance has the square of two variances": {"power": 3},
        "half of the pairs: each of the d dimensions has d - 1 others": {"others": lambda d: (d - 1) / 2},
        "this is the bound for standardized dimensions": lambda n, d, sigma: d / (n - 1) - 1,
        "the sum over all pairs is not divided by d": {"others": lambda d: d * (d - 1)},
        "this is the root of one squared covariance: sum them": lambda n, d, sigma: sigma**2 / (n - 1) ** 0.5,
        "this is one pair: a dimension has d - 1 others": {"others": lambda d: 1},
        "this is the loss of both views: one is asked for": {"others": lambda d: 2 * (d - 1)},
    },
)
def noise_floor(n, d, sigma, *, others=lambda d: d - 1, count=lambda n: n - 1, power=4):
    """`(N, d, sigma) -> loss`: the expected covariance loss of one view, for independent dimensions."""
    return others(d) * sigma**power / count(n)


@exercise(
    inputs=lambda r: [(0.2, 10.0, 5.0, 2.0), (0.6, 1.0, 3.0, 0.5), (0.5, 25.0, 25.0, 1.0), (0.9, 25.0, 25.0, 1.0)],
    returns={"standard deviation": "one number, at most gamma"},
    mistakes={
        "the smaller of both is where the loss is least: beyond gamma the hinge is flat": {"at_most": max},
        "a factor of 2 too many: the derivative of 2 lambda (1 - rho) sigma^2 is 4 lambda (1 - rho) sigma": {
            "factor": 8
        },
        "both factors of 2 are missing: from the difference of two views, and from the derivative": {"factor": 1},
        "it may not exceed gamma, where the hinge ends": {"at_most": lambda best, gamma: best},
        "the noise is 1 - rho: rho is what the views share": {"noise": lambda rho: rho},
        "lambda and mu are exchanged": lambda rho, lam, mu, gamma: balance.solution(rho, mu, lam, gamma),
        "a factor of 2 is missing: E (z - z')^2 is 2 sigma^2 (1 - rho)": {"factor": 2},
        "this is the loss's minimum over the square of sigma: take no root": lambda rho, lam, mu, gamma: min(
            gamma, (mu / (4 * lam * (1 - rho))) ** 0.5
        ),
        "this is 1 over sigma": lambda rho, lam, mu, gamma: 1 / balance.solution(rho, lam, mu, gamma),
    },
)
def balance(rho, lam, mu, gamma, *, noise=lambda rho: 1 - rho, factor=4, at_most=lambda best, gamma: min(best, gamma)):
    """`(rho, lam, mu, gamma) -> sigma` at which the invariance and the variance term balance, in the package's form."""
    return at_most(mu / (factor * lam * noise(rho)), gamma)


def _standardized(z):
    z = z - z.mean(0)
    return z / z.square().mean(0).sqrt()


def _barlow(z_1, z_2, lam, scale=_standardized, count=len, weights=lambda lam: (1, lam), diagonal=False):
    c = scale(z_1).T @ scale(z_2) / count(z_1)
    rest = c if diagonal else _off_diagonal(c)
    on, off = weights(lam)
    return on * (1 - c.diagonal()).square().sum() + off * rest.square().sum()


@exercise(
    inputs=lambda r: [(x := _mixed(r, 20, 4), x + 0.5 * r.normal(20, 4), lam) for lam in (0.1, 0.02)],
    returns={"loss": "one number"},
    gradient=True,
    mistakes={
        "the means are not subtracted": {"scale": lambda z: z / z.std(0, correction=0)},
        "these are covariances: divide by the standard deviations over the batch": {"scale": _centered},
        "each image is scaled to length 1: scale each dimension over the batch": {
            "scale": lambda z: z / z.norm(dim=1, keepdim=True)
        },
        "the variances divide by N here: with N - 1 the diagonal cannot reach 1": {
            "scale": lambda z: _centered(z) / z.std(0)
        },
        "the sums over dimensions, not their mean": lambda z_1, z_2, lam: _barlow(z_1, z_2, lam) / z_1.shape[1],
        "square each 1 - R_jj, then add up": lambda z_1, z_2, lam: (
            (d := 1 - (_standardized(z_1).T @ _standardized(z_2) / len(z_1)).diagonal()).sum().square()
            - d.square().sum()
            + _barlow(z_1, z_2, lam)
        ),
        "1 - R_jj is squared, not R_jj": lambda z_1, z_2, lam: (
            (d := (_standardized(z_1).T @ _standardized(z_2) / len(z_1)).diagonal()).neg().add(1).mul(2 * d).sum()
            + _barlow(z_1, z_2, lam)
        ),
        "lambda, the beta of the text, weights the diagonal: it belongs to the rest": {"weights": lambda lam: (lam, 1)},
        "the diagonal is penalized, too: leave it out of the second sum": {"diagonal": True},
        "both views are the same here: correlate the first with the second": lambda z_1, z_2, lam: _barlow(
            z_1, z_1, lam
        ),
        "the products are not divided by N: the diagonal cannot be 1": {"count": lambda z: 1},
    },
)
def barlow_loss(z_1, z_2, lam, *, scale=_standardized, count=len, weights=lambda lam: (1, lam), diagonal=False):
    """`(z_1, z_2, lam) -> loss`: the cross-correlation against the identity."""
    return _barlow(z_1, z_2, lam, scale, count, weights, diagonal)


def _cholesky(c):
    return torch.linalg.inv(torch.linalg.cholesky(c))


def _gram(z):
    """What all whitenings have in common: the inner products of the rows."""
    return z @ z.T if z.ndim == 2 else z


@exercise(
    inputs=lambda r: [(_mixed(r, 24, 4).double(),), (_mixed(r, 9, 3).double(),)],
    returns={"whitened rows": "the shape of z"},
    compare=_gram,
    mistakes={
        "the mean is not subtracted": {"center": lambda z: z},
        "this multiplies by the root of the covariance: by its inverse": {
            "matrix": lambda c: (e := torch.linalg.eigh(c)).eigenvalues.sqrt()[:, None] * e.eigenvectors.T
        },
        "this multiplies by the Cholesky factor: by its inverse": {"matrix": torch.linalg.cholesky},
        "the columns have length 1: variance 1 over N - 1 is a length of the root of N - 1": lambda z: (
            torch.linalg.svd(_centered(z), full_matrices=False).U
        ),
        "the rows have length 1: that comes after whitening, in the loss": lambda z: (
            (w := whiten.solution(z)) / w.norm(dim=1, keepdim=True)
        ),
        "the eigenvectors are the columns of U: rows times U, not times its transpose": {
            "matrix": lambda c: (e := torch.linalg.eigh(c)).eigenvalues.rsqrt()[:, None] * e.eigenvectors
        },
        "this multiplies by the inverse covariance: by the inverse of its root": {"matrix": torch.linalg.inv},
        "every dimension is scaled by itself: correlations are still there": {
            "matrix": lambda c: torch.diag(c.diagonal() ** -0.5)
        },
        "divided by N: with N - 1 in the covariance": {"count": len},
        "the rows times the Cholesky factor's inverse: its transpose is needed": {
            "matrix": lambda c: _cholesky(c).T.contiguous()
        },
        "rotated into the eigenvectors, but not scaled": {"matrix": lambda c: torch.linalg.eigh(c).eigenvectors.T},
    },
)
def whiten(z, *, center=_centered, count=lambda z: len(z) - 1, matrix=_cholesky):
    """`(z) -> (N, d)`: uncorrelated dimensions with variance 1; any rotation of them is right."""
    z = center(z)
    return z @ matrix(z.T @ z / count(z)).T


@exercise(
    inputs=lambda r: [(r.uniform(6) + 0.5, r.uniform(3) + 0.5), (r.uniform(4) + 0.2, r.uniform(5) + 0.2)],
    returns={"difference": "one number"},
    mistakes={
        "the sign: the diagonal that a criterion leaves out is what it lacks": lambda rows, columns: (
            -gap.solution(rows, columns)
        ),
        "the norms to the second power are the diagonal: its entries are squared once more": {"power": 2},
        "the norms themselves: to the fourth power": {"power": 1},
        "the sum of both: one is subtracted": lambda rows, columns: (rows**4).sum() + (columns**4).sum(),
        "the sum of fourth powers, not the square of the sum of squares": lambda rows, columns: (
            (rows**2).sum() ** 2 - (columns**2).sum() ** 2
        ),
        "the columns have a diagonal as well: subtract their sum": lambda rows, columns: (rows**4).sum(),
        "the means: sum over rows, and over columns": lambda rows, columns: (rows**4).mean() - (columns**4).mean(),
    },
)
def gap(rows, columns, *, power=4):
    """`(row norms, column norms) -> difference`: the criterion over dimensions minus the one over images."""
    return (rows**power).sum() - (columns**power).sum()


@exercise(
    inputs=lambda r: [(0.005, 8192, 2048, 256, 128), (0.02, 128, 256, 1024, 256), (0.1, 64, 512, 64, 32)],
    returns={"lambda": "one number"},
    mistakes={
        "a dimension has d - 1 others, not d": {"pairs": lambda d, d_new: d / d_new},
        "the noise is beta (d - 1) / N, with N and not N - 1": {"batch": lambda n, n_new: (n_new - 1) / (n - 1)},
        "upside down in both: the new weight times the new noise is the old product": lambda lam, d, n, d_new, n_new: (
            lam**2 / new_lambda.solution(lam, d, n, d_new, n_new)
        ),
        "the old weight is missing: this is the factor for it": lambda lam, d, n, d_new, n_new: new_lambda.solution(
            1.0, d, n, d_new, n_new
        ),
        "the batch is left out: noise falls with N": {"batch": lambda n, n_new: 1},
        "upside down in N: fewer images give more noise, so a smaller lambda": {"batch": lambda n, n_new: n / n_new},
        "upside down in d: more dimensions give more pairs, so a smaller lambda": {
            "pairs": lambda d, d_new: (d_new - 1) / (d - 1)
        },
        "pairs per dimension grow as d - 1, not as its square": {
            "pairs": lambda d, d_new: ((d - 1) / (d_new - 1)) ** 2
        },
    },
)
def new_lambda(
    lam, d, n, d_new, n_new, *, pairs=lambda d, d_new: (d - 1) / (d_new - 1), batch=lambda n, n_new: n_new / n
):
    """`(lam, d, N, new d, new N) -> lam` that keeps the redundancy of pure noise, per dimension."""
    return lam * pairs(d, d_new) * batch(n, n_new)
