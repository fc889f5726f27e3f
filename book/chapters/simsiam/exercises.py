"""The exercises of the chapter *SimSiam*."""

import math

import torch
import torch.nn.functional as F

from sslbook.notebook.exercises import exercise


def _cosine(p, z):
    return -F.cosine_similarity(p, z, dim=1).mean()


@exercise(
    inputs=lambda r: [tuple(2 * r.normal(6, 5) for _ in range(4)), tuple(r.normal(4, 3) for _ in range(4))],
    returns={"loss": "the mean over the rows is one number"},
    gradient=True,
    mistakes={
        "the gradient flows into the targets: detach both": {"stop": lambda z: z},
        "only one of the two targets is detached": [
            lambda p1, p2, z1, z2: _cosine(p1, z2.detach()) / 2 + _cosine(p2, z1) / 2,
            lambda p1, p2, z1, z2: _cosine(p1, z2) / 2 + _cosine(p2, z1.detach()) / 2,
        ],
        "the gradient is stopped in the predictions: the targets are the constants": lambda p1, p2, z1, z2: (
            _cosine(z2, p1.detach()) / 2 + _cosine(z1, p2.detach()) / 2
        ),
        "each view predicts itself: p_1 goes with z_2": lambda p1, p2, z1, z2: loss.solution(p1, p2, z2, z1),
        "the sign: the loss is minus the cosine": {"sign": 1},
        "the sum of both directions: take half of each": {"half": 1},
        "one direction is missing": lambda p1, p2, z1, z2: _cosine(p1, z2.detach()),
        "the mean over the rows, not their sum": {"distance": lambda p, z: -F.cosine_similarity(p, z, dim=1).sum()},
        "the cosine of columns: each row is one image, dim=1": {
            "distance": lambda p, z: -F.cosine_similarity(p, z, dim=0).mean()
        },
        "this is 2 - 2 cos, BYOL's loss: SimSiam's is minus the cosine": lambda *a: 2 + 2 * loss.solution(*a),
        "the rows are not of unit length: take the cosine, not the inner product": {
            "distance": lambda p, z: -(p * z).sum(1).mean()
        },
    },
)
def loss(p_1, p_2, z_1, z_2, *, stop=lambda z: z.detach(), sign=-1, half=0.5, distance=_cosine):
    """`(p_1, p_2, z_1, z_2) -> loss`: minus the cosine, both directions, no gradient for z_1 and z_2."""
    return -sign * half * (distance(p_1, stop(z_2)) + distance(p_2, stop(z_1)))


@exercise(
    inputs=lambda r: [(r.normal(5, 1, 4) + 0.7 * r.normal(5, 8, 4),), (3 * r.normal(3, 6, 2),)],
    returns={"direction": "one row for each image", "weight": "one number for each image"},
    mistakes={
        "normalize each view before the mean: the loss sees directions": lambda views: (
            F.normalize(views.mean(1), dim=1),
            views.mean(1).norm(dim=1),
        ),
        "the entries of each view are normalized, the last axis: axis 1 counts the views": lambda views: (
            F.normalize(F.normalize(views, dim=1).mean(1), dim=1),
            F.normalize(views, dim=1).mean(1).norm(dim=1),
        ),
        "the weight is the length of the mean over views, not of their sum": lambda views: (
            targets.solution(views)[0],
            F.normalize(views, dim=2).sum(1).norm(dim=1),
        ),
        "the direction must have length 1": {"unit": lambda m: m},
        "exchanged: first the direction, then the weight": lambda views: targets.solution(views)[::-1],
        "the weight is the length of the mean, not its square": {"weight": lambda m: m.square().sum(1)},
        "every image has weight 1: what does the mean of unequal unit vectors lose?": {
            "weight": lambda m: torch.ones(len(m), dtype=m.dtype)
        },
        "the mean is over views, the second axis": lambda views: targets.solution(views.transpose(0, 1)),
    },
)
def targets(views, *, unit=lambda m: F.normalize(m, dim=1), weight=lambda m: m.norm(dim=1)):
    """`(views) -> (direction, weight)`: what the cosine pulls a prediction to, and how strongly, for each image."""
    m = F.normalize(views, dim=2).mean(1)
    return unit(m), weight(m)


def _covariances(r, n, d):
    a, b = r.normal(n, n), r.normal(n, n)
    return r.normal(d, n), a @ a.T / n, b @ b.T / n + 0.3 * torch.eye(n)


@exercise(
    inputs=lambda r: [_covariances(r, 4, 2), _covariances(r, 5, 3)],
    returns={"next W": "the shape of W", "predictor": "square, as many rows as W"},
    mistakes={
        "exchanged: first the next W, then the predictor": lambda *a: power_round.solution(*a)[::-1],
        "the predictor is missing in the next W: solve V W = W G": {"divide": lambda V, product: product},
        "V multiplies: the network is fitted so that V W meets the targets": {"divide": lambda V, product: V @ product},
        "the inverse is of the total covariance S + A, not of A": {"total": lambda S, A: A},
        "G is S (S + A)^-1: W is multiplied from the right by S, then by the inverse": {
            "G": lambda S, total: torch.linalg.inv(total) @ S
        },
        "V is transposed": [
            lambda W, S, A: (
                torch.linalg.solve(power_round.solution(W, S, A)[1].T, (W @ S @ torch.linalg.inv(S + A)).double()),
                power_round.solution(W, S, A)[1].T,
            ),
            lambda W, S, A: (power_round.solution(W, S, A)[0], power_round.solution(W, S, A)[1].T),
        ],
    },
)
def power_round(
    W, S, A, *, total=lambda S, A: S + A, divide=torch.linalg.solve, G=lambda S, total: S @ torch.linalg.inv(total)
):
    """`(W, S, A) -> (next W, predictor)`: one exact round with a predictor."""
    W, S, A = W.double(), S.double(), A.double()
    whole = total(S, A)
    V = W @ S @ W.T @ torch.linalg.inv(W @ whole @ W.T)
    return divide(V, W @ G(S, whole)), V


@exercise(
    inputs=lambda r: [(0.9, 0.5, 100.0), (0.8, 0.2, 10.0), (0.99, 0.97, 1000.0)],
    returns={"rounds": "a number of rounds, not rounded"},
    mistakes={
        "the ratio is upside down": lambda a, b, f: 1 / rounds.solution(a, b, f),
        "the sign is wrong: log(gamma_2 / gamma_1) is negative": lambda a, b, f: -rounds.solution(a, b, f),
        "the difference of the eigenvalues: each round multiplies by their ratio": {
            "gap": lambda first, second: first - second
        },
        "only the first: the second direction shrinks as well": {"gap": lambda first, second: -math.log(second)},
        "not rounded: return the number itself": lambda a, b, f: math.ceil(rounds.solution(a, b, f)),
        "logarithms of different base": lambda a, b, f: math.log10(f) / math.log(a / b),
    },
)
def rounds(first, second, factor, *, gap=lambda first, second: math.log(first / second)):
    """`(gamma_1, gamma_2, factor) -> rounds` until the first direction is `factor` times as large as the second."""
    return math.log(factor) / gap(first, second)


@exercise(
    inputs=lambda r: [(r.normal(400, 5) + torch.tensor([2.0, 0, 0, 0, 0]),), (3 * r.normal(300, 8) - 0.5,)],
    returns={"feature_std": "one number"},
    rtol=5e-3,
    mistakes={
        "the rows are not of length 1: normalize each first": {"unit": lambda z: z},
        "the columns are normalized: normalize the rows": {"unit": lambda z: F.normalize(z, dim=0)},
        "the factor sqrt(d) is missing": {"factor": lambda d: 1.0},
        "the factor is sqrt(d), not d": {"factor": lambda d: float(d)},
        "the root of the mean variance: take the mean of the roots": lambda z: (
            F.normalize(z, dim=1).var(0, correction=0).sum().sqrt()
        ),
        "the variance: take its root": lambda z: F.normalize(z, dim=1).var(0, correction=0).mean() * z.shape[1],
        "over the entries of each row: take the std over images, of each entry": lambda z: (
            F.normalize(z, dim=1).std(1, correction=0).mean() * z.shape[1] ** 0.5
        ),
    },
)
def thermometer(z, *, unit=lambda z: F.normalize(z, dim=1), factor=math.sqrt):
    """`(z) -> feature_std`: the mean standard deviation of the normalized rows' entries, times sqrt(d)."""
    return unit(z).std(0, correction=0).mean() * factor(z.shape[1])


@exercise(
    inputs=lambda r: [(0.9,), (0.6,), (1.0,), (0.3,)],
    returns={"fraction": "the smaller side, between 0 and 1/2"},
    mistakes={
        "this is the larger side": lambda s: 1 - smaller_side.solution(s),
        "the root is missing: nu (1 - nu) = s^2 / 4 is quadratic in nu": lambda s: s**2 / 4,
        "s is not squared": {"power": 1},
        "the factor 4 is missing: s = 2 sqrt(nu (1 - nu))": lambda s: (1 - math.sqrt(max(0.0, 1 - 4 * s**2))) / 2,
        "nu alone is taken for nu (1 - nu): solve the quadratic equation": lambda s: s / 2,
        "divide by 2: the roots are (1 +- ...)/2": lambda s: 2 * smaller_side.solution(s),
    },
)
def smaller_side(s, *, power=2):
    """`(s) -> nu`: the smaller fraction of two opposite points whose feature_std is s."""
    return (1 - math.sqrt(1 - s**power)) / 2


@exercise(
    inputs=lambda r: [(step, 100, 0.05) for step in (5, 0, 50, 99)],
    returns={"backbone": "warm-up and cosine", "predictor": "constant"},
    mistakes={
        "exchanged: the backbone's rate first": lambda *a: rates.solution(*a)[::-1],
        "the predictor's rate stays from the first step on: it has no warm-up": lambda step, steps, lr: (
            rates.solution(step, steps, lr)[0],
            lr * min(1.0, (step + 1) / (0.1 * steps)),
        ),
        "the predictor's rate decays, too: it must stay": {"predictor": lambda lr, share: lr * share},
        "no warm-up": {"rise": lambda step, steps: 1.0},
        "the warm-up takes a tenth of the steps": {"rise": lambda step, steps: min(1.0, (step + 1) / 10 / steps)},
        "the rate is 0 in step 0: the warm-up counts from step + 1": {
            "rise": lambda step, steps: min(1.0, step / (0.1 * steps))
        },
        "the cosine ends at -lr: shift it by 1 and halve it": lambda step, steps, lr: (
            lr * min(1.0, (step + 1) / (0.1 * steps)) * math.cos(math.pi * step / steps),
            lr,
        ),
    },
)
def rates(
    step,
    steps,
    lr,
    *,
    rise=lambda step, steps: min(1.0, (step + 1) / (0.1 * steps)),
    predictor=lambda lr, share: lr,
):
    """`(step, steps, lr) -> (backbone's rate, predictor's rate)`."""
    share = rise(step, steps) * 0.5 * (1 + math.cos(math.pi * step / steps))
    return lr * share, predictor(lr, share)


@exercise(
    inputs=lambda r: [(2.0,), (1.0,), (3.0,)],
    returns={"fraction": "a number below 1"},
    mistakes={
        "upside down: a step with an EMA is the more expensive one": lambda b: 1 / equal_compute.solution(b),
        "this is what the EMA adds, as a fraction of SimSiam's step": lambda b: 1 / (1 + b),
        "the target network sees both views": {"views": 1},
        "this is what the EMA adds, as a fraction of its own step: subtract it from 1": lambda b: 1 / (2 + b),
        "a step also has forward passes: two and two backward": lambda b: 2 * b / (2 * b + 2),
        "there is no backward pass through the target network": {"target": lambda b: 1 + b},
        "both views go through the trained network, forward and backward": lambda b: (1 + b) / (3 + b),
    },
)
def equal_compute(backward, *, views=2, target=lambda b: 1):
    """`(backward) -> fraction` of SimSiam's steps that a run with an EMA network can have at equal compute."""
    own = 2 * (1 + backward)
    return own / (own + views * target(backward))
