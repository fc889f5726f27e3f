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
        "the sign is wrong: log m is negative": lambda m: -half_life.solution(m),
        "m and 1 - m are exchanged: what is kept is m": {"kept": lambda m: 1 - m},
        "the ratio is upside down: t = log(1/2) / log m": lambda m: 1 / half_life.solution(m),
    },
)
def half_life(m, *, kept=lambda m: m):
    """`(m) -> steps` after which half of an old target network is left, with EMA momentum m."""
    return math.log(0.5) / math.log(kept(m))


__all__ = ["byol_loss", "half_life", "torch"]
