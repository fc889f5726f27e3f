"""The exercises of the chapter *MAE*."""

import torch
from einops import rearrange

from sslbook.nn.patches import normalize_patches
from sslbook.notebook.exercises import exercise


@exercise(
    inputs=lambda r: [(r.normal(2, 3, 8, 12), 4), (r.normal(1, 3, 6, 4), 2)],
    returns={"patches": "H/P * W/P patches of P * P * 3 values"},
    mistakes={
        "reshape alone cuts strips of numbers, not squares: permute before the last reshape": lambda x, P: x.reshape(
            len(x), -1, P * P * 3
        ),
        "the colors come first within a patch: move their axis to the very end": {"pattern": "(h w) (c p q)"},
        "patches are counted column by column: rows of patches come first": {"pattern": "(w h) (p q c)"},
        "the pixels of a patch are transposed: its rows come before its columns": {"pattern": "(h w) (q p c)"},
    },
)
def patchify(x, P, *, pattern="(h w) (p q c)"):
    """`(x, P) -> patches`, row by row, within a patch pixel by pixel with its colors last."""
    return rearrange(x, f"n c (h p) (w q) -> n {pattern}", p=P, q=P)


@exercise(
    inputs=lambda r: [(r.uniform(4, 9), 3), (r.uniform(2, 16), 4)],
    returns={"visible": "exactly `keep` indices for every image", "restore": "one position for every patch"},
    mistakes={
        "these are ranks, not indices: sort once for the visible patches": {"first": lambda o, k: o.argsort(1)[:, :k]},
        "these are the indices of the largest numbers: take the first of the sorted order": [
            {"first": lambda o, k: o[:, -k:]},
            {"first": lambda o, k: o.flip(1)[:, :k]},
        ],
        "restore is the sorting order itself; its inverse is its own argsort": {"inverse": lambda order: order},
    },
)
def mask(u, keep, *, first=lambda order, keep: order[:, :keep], inverse=lambda order: order.argsort(1)):
    """`(u, keep) -> (visible, restore)`: indices of the `keep` smallest numbers, and the inverse of the order."""
    order = u.argsort(1)
    return first(order, keep), inverse(order)


def _normalized(x, correction=1, power=0.5):
    return (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, correction=correction) + 1e-6) ** power


@exercise(
    inputs=lambda r: [
        (r.normal(3, 8, 12), 2 * r.normal(3, 8, 12) + 1, (r.uniform(3, 8).argsort(1) < masked).float())
        for masked in (6, 3)
    ],
    returns={"loss": "one number for the batch"},
    mistakes={
        "divided by all patches: divide by the number of masked ones, mask.sum()": {"over": torch.numel},
        "averaged over all patches: multiply by the mask": {"weight": torch.ones_like},
        "the visible patches are scored: 1 means masked": {"weight": lambda mask: 1 - mask},
        "the target is not normalized": {"target": lambda x: x},
        "normalized over the whole batch: each patch has its own mean and variance": {
            "target": lambda x: (x - x.mean()) / x.std()
        },
        "biased variance: divide by the number of values less one (torch.var's default)": {
            "target": lambda x: _normalized(x, correction=0)
        },
        "divided by the variance: take its root": {"target": lambda x: _normalized(x, power=1)},
        "summed over the values of a patch: take their mean": {"values": torch.sum},
        "the prediction is normalized too: it is compared as it is": lambda p, x, m: loss.solution(
            _normalized(p), x, m
        ),
    },
)
def loss(prediction, patches, mask, *, target=normalize_patches, weight=torch.clone, over=torch.sum, values=torch.mean):
    """`(prediction, patches, mask) -> loss` over masked patches (1 in `mask`), each normalized by itself."""
    each = values((prediction - target(patches)).square(), 2) * weight(mask)
    return each.sum() / over(weight(mask))


@exercise(
    inputs=lambda r: [(torch.tensor([2, 0, 1, 1]), torch.tensor([0, 3, 1, 2]), 3, 2, 5)],
    returns={"mask": "one number for each of grid * grid patches, row by row"},
    mistakes={
        "1 means masked: the rectangle itself, not what is around it": {"inside": 0},
        "rows and columns are swapped": {"axes": (0, 2, 1)},
        "one row and one column too many: the end is not included": {"more": 1},
        "height and width are swapped": lambda top, left, height, width, grid: block.solution(
            top, left, width, height, grid
        ),
    },
)
def block(top, left, height, width, grid, *, inside=1, axes=(0, 1, 2), more=0):
    """`(top, left, height, width, grid) -> mask (N, grid * grid)`, 1 inside the rectangle."""
    i = torch.arange(grid)
    rows = (i >= top[:, None]) & (i < top[:, None] + height + more)
    columns = (i >= left[:, None]) & (i < left[:, None] + width + more)
    return (inside == (rows[:, :, None] & columns[:, None]).permute(axes).int()).flatten(1)


@exercise(
    inputs=lambda r: [(196, 1024, 0.6), (1024, 64, 0.75), (4096, 192, 0.5)],
    returns={"cost": ""},
    rtol=2e-2,  # with or without the class token, rounded or not
    mistakes={
        "linear layers alone: attention falls with the square of the tokens": {"attention": 0},
        "attention alone: the linear layers cost 12 n d^2": {"linear": 0},
        "upside down: SimMIM's encoder costs more": {"power": -1},
        "the masked patches are kept: MAE's encoder sees the fraction 1 - ratio": {"kept": lambda ratio: ratio},
        "attention costs n^2 d twice: for the scores and for the weighted sum": {"attention": 1},
    },
)
def simmim_cost(num_patches, dim, ratio, *, linear=12, attention=2, power=1, kept=lambda ratio: 1 - ratio):
    """`(num_patches, dim, mask_ratio) -> cost` of a block of SimMIM's encoder, as a multiple of MAE's."""
    all_tokens, visible = num_patches + 1, kept(ratio) * num_patches + 1
    cost = [linear * n * dim**2 + attention * n**2 * dim for n in (all_tokens, visible)]
    return (cost[0] / cost[1]) ** power


@exercise(
    inputs=lambda r: [(r.normal(7).exp(),), (r.normal(11) ** 3,)],  # odd numbers: the minimum is at one place
    returns={"constant": "one number"},
    mistakes={
        "this minimizes the squared error: for the absolute error as many values must lie above as below": torch.mean,
        "the middle between the extremes minimizes the largest error": lambda x: (x.min() + x.max()) / 2,
        "the most frequent place is no minimum: count values above and below": lambda x: x[x.abs().argmin()],
    },
)
def absolute_error_minimizer(x):
    """`(values) -> constant` with the smallest mean absolute error."""
    return x.median()


@exercise(
    inputs=lambda r: [((a := r.normal(n, 2 * n)) @ a.T / n + torch.eye(n),) for n in (4, 6)],
    returns={"W at ratio 0": "the shape of sigma", "W at ratio 1": "the shape of sigma"},
    mistakes={
        "exchanged: first the limit of ratio 0": lambda s: linear_limits.solution(s)[::-1],
        "at ratio 0 everything is visible, so everything is copied": {"low": lambda s: s},
        "each column has its own variance: divide sigma_ij by sigma_jj, not by sigma_ii": {"axis": 1},
        "at ratio 1 the covariance between visible patches drops out: only their variances are divided by": {
            "high": lambda s: torch.eye(len(s))
        },
        "divide by the variance, not by the standard deviation (this is no correlation)": {
            "high": lambda s: s / (s.diagonal()[:, None] * s.diagonal()).sqrt()
        },
    },
)
def linear_limits(sigma, *, low=lambda s: torch.eye(len(s)), high=None, axis=0):
    """`(sigma) -> (W, W)`: the linear optimum of the loss on all patches, as the mask ratio goes to 0 and to 1."""
    return low(sigma), high(sigma) if high else sigma / sigma.diagonal().unsqueeze(axis)


@exercise(
    inputs=lambda r: [(0.0, 0.1), (0.5, 0.1), (2.0, 0.5)],
    returns={"loss per value": ""},
    mistakes={
        "this is the share of the structure: the noise is what no network predicts": lambda s, v: s / (s + v),
        "in pixels: divide by the patch's variance, as normalization does": lambda s, v: v,
        "the patch's variance is that of structure and noise": lambda s, v: v / s if s else float("inf"),
        "divide by the variance, not by its root": lambda s, v: v / (s + v) ** 0.5,
    },
)
def unpredictable_loss(structure, noise):
    """`(variance of structure, variance of noise) -> loss` per normalized value that no network can remove."""
    return noise / (structure + noise)
