"""Checks for the chapter *SimCLR*, and what it runs in two processes."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sslbook import distributed
from sslbook.methods import simclr
from sslbook.notebook.exercises import Check, exercise

# Two processes --------------------------------------------------------------------------------------------------------


def shard_gradients(
    z_1: Float[Tensor, "n dim"], z_2: Float[Tensor, "n dim"], temperature: float
) -> dict[str, tuple[float, Tensor]]:
    """Loss and gradient for this process's rows of `z_1`, with and without gradient through the gathered rows.

    For `distributed.launch`: every process gets all rows and works on its own, as if its network had just computed
    them. The gradient is the one of data-parallel training, which divides by the number of processes.
    """
    processes, rank = distributed.world_size(), distributed.rank()
    own = slice(rank * len(z_1) // processes, (rank + 1) * len(z_1) // processes)
    found = {}
    for name, loss_fn in (("gather_with_grad", simclr.nt_xent), ("gather", nt_xent_detached)):
        mine_1, mine_2 = (z[own].clone().requires_grad_() for z in (z_1, z_2))
        loss = loss_fn(mine_1, mine_2, temperature)
        (gradient,) = torch.autograd.grad(loss, mine_1)
        found[name] = distributed.all_reduce_mean(loss.detach()).item(), gradient / processes
    return found


def nt_xent_detached(z_1: Float[Tensor, "n dim"], z_2: Float[Tensor, "n dim"], temperature: float) -> Float[Tensor, ""]:
    """The mistake: candidates are gathered as constants, so that a row learns as an anchor only."""
    first = distributed.rank() * len(z_1)
    positive = first + torch.arange(len(z_1))
    z_1, z_2 = F.normalize(z_1, dim=1), F.normalize(z_2, dim=1)
    loss = z_1.new_zeros(())
    for anchor, other in ((z_1, z_2), (z_2, z_1)):
        s_same = anchor @ distributed.all_gather(anchor.detach()).T
        s_same = s_same.diagonal_scatter(torch.full_like(s_same[:, 0], -torch.inf), offset=first)
        s_other = anchor @ distributed.all_gather(other.detach()).T
        loss = loss + F.cross_entropy(torch.cat([s_other, s_same], dim=1) / temperature, positive)
    return loss


# Exercises ------------------------------------------------------------------------------------------------------------


def _logits(z: Float[Tensor, "views dim"], temperature: float, mask: bool = True) -> Float[Tensor, "views views"]:
    similarity = F.normalize(z, dim=1) @ F.normalize(z, dim=1).T / temperature
    return similarity.fill_diagonal_(-torch.inf) if mask else similarity


def _positive(views: int) -> Int[Tensor, "views"]:
    return torch.arange(views).roll(views // 2)


def _loss(z: Float[Tensor, "views dim"], temperature: float) -> Float[Tensor, ""]:
    return F.cross_entropy(_logits(z, temperature), _positive(len(z)))


@exercise
def nt_xent(check: Check, answer: Callable) -> None:
    """`answer(z, temperature) -> loss`; rows `i` and `i + N` of `z` belong together (equation 1, paper's mean)."""
    for n, tau in ((6, 0.5), (9, 0.1)):
        z = 2 * check.random(2 * n, 5)
        loss = check.call(answer, z, tau)
        check.shape(loss, (), "the mean over all 2N rows is one number")
        neighbor = torch.arange(2 * n) ^ 1
        raw = (z @ z.T / tau).fill_diagonal_(-torch.inf)
        logits, positive = _logits(z, tau), _positive(2 * n)
        score = logits.gather(1, positive[:, None])[:, 0]
        negatives = logits.scatter(1, positive[:, None], -torch.inf)
        expected = _loss(z, tau)
        check.close(
            loss,
            expected,
            mistakes={
                "row i still contains its own similarity: mask the diagonal before the softmax": F.cross_entropy(
                    _logits(z, tau, mask=False), positive
                ),
                "the rows are not of unit length: divide each by its norm before the products": F.cross_entropy(
                    raw, positive
                ),
                "the temperature multiplies: divide the similarities by it": _loss(z, 1 / tau),
                "the temperature has no effect: divide the similarities by it": _loss(z, 1.0),
                "rows 2i and 2i + 1 are paired: here rows i and i + N belong together": F.cross_entropy(
                    logits, neighbor if n % 2 == 0 else neighbor.clamp(max=2 * n - 1)
                ),
                "only the first N rows ask: the second views are anchors too": F.cross_entropy(
                    logits[:n], positive[:n]
                ),
                "twice the mean over all 2N rows (the authors' code): the exercise asks for the paper's mean": 2
                * expected,
                "the sum over the rows: divide by 2N": 2 * n * expected,
                "the positive is missing from the denominator: k runs over all rows but i": (
                    negatives.logsumexp(1) - score
                ).mean(),
                "the sign is wrong: the loss is minus the logarithm of a probability": -expected,
            },
            what="loss",
        )
    z = check.random(8, 4)
    check.gradient(lambda z: answer(z, 0.5), lambda z: _loss(z, 0.5), z)
    cold = check.call(answer, F.normalize(check.random(8, 4), dim=1), 0.005)
    check.that(
        torch.isfinite(cold),
        "at temperature 0.005 the loss is not finite: take logsumexp (or cross_entropy), not the log of a sum of exp",
        "a low temperature",
    )


@exercise
def anchor_gradient(check: Check, answer: Callable) -> None:
    """`answer(z, i, j, temperature) -> (dim,)`: the derivative of anchor i's loss for `z_i`, rows of unit length."""
    for tau, (i, j) in ((0.5, (0, 3)), (0.2, (4, 1))):
        z = F.normalize(check.random(8, 5), dim=1)
        given = check.call(answer, z, i, j, tau)
        check.shape(given, (5,), "one number per dimension of z_i")
        s = z @ z[i] / tau
        masked = s.index_fill(0, torch.tensor([i]), -torch.inf)
        p = masked.softmax(0)
        negatives = masked.index_fill(0, torch.tensor([j]), -torch.inf).softmax(0)
        expected = (p @ z - z[j]) / tau
        check.close(
            given,
            expected,
            mistakes={
                "the factor 1 / temperature is missing": expected * tau,
                "the sign is wrong: this is the direction that lowers the loss, the gradient points the other way": -expected,
                "p still contains k = i: leave the anchor out of its own softmax": (s.softmax(0) @ z - z[j]) / tau,
                "p misses the positive: it runs over all k but i, the positive among them": (negatives @ z - z[j])
                / tau,
                "the positive is missing: subtract z_j": p @ z / tau,
                "the weights ignore the temperature: p is the softmax of s / temperature": (
                    (z @ z[i]).index_fill(0, torch.tensor([i]), -torch.inf).softmax(0) @ z - z[j]
                )
                / tau,
                "this is the gradient behind the normalization: the exercise asks for the one before it is projected": (
                    expected - (expected @ z[i]) * z[i]
                ),
            },
            what="gradient of one anchor",
        )


@exercise
def through_normalization(check: Check, answer: Callable) -> None:
    """`answer(u, gradient) -> (dim,)`: from the derivative for z = u / |u| to the one for u."""
    u, g = 3 * check.random(6), check.random(6)
    given = check.call(answer, u, g)
    check.shape(given, (6,))
    norm, z = u.norm(), u / u.norm()
    tangent = g - (g @ z) * z
    check.close(
        given,
        tangent / norm,
        mistakes={
            "the factor 1 / |u| is missing": tangent,
            "multiplied by |u|: a longer vector rotates less, so divide": tangent * norm,
            "nothing is projected out: subtract the component along z": g / norm,
            "the projection uses u where the unit vector z belongs": (g - (g @ u) * u) / norm,
            "this keeps the component along z and drops the rest": (g @ z) * z / norm,
        },
        what="projected gradient",
    )
    check.that(abs(float(given @ u)) < 1e-4, "the result must be orthogonal to u", "orthogonality")


@exercise
def information_bound(check: Check, answer: Callable) -> None:
    """`answer(scores) -> bound in nats`; `scores[i, k]` is phi(x_i, y_k), the pairs stand on the diagonal."""
    for n in (5, 12):
        scores = 2 * check.random(n, n) + 3 * torch.eye(n)
        given = check.call(answer, scores)
        check.shape(given, (), "one number of nats")
        target = torch.arange(n)
        loss = F.cross_entropy(scores, target)
        log_n = torch.log(torch.tensor(float(n)))
        off = scores.clone().fill_diagonal_(-torch.inf).logsumexp(1)
        check.close(
            given,
            log_n - loss,
            mistakes={
                "this is the loss: the bound is log N minus it": loss,
                "log N is missing: the bound is log N minus the loss": -loss,
                "added instead of subtracted: log N - loss": log_n + loss,
                "in bits: take natural logarithms": (log_n - loss) / torch.log(torch.tensor(2.0)),
                "the softmax runs over columns: for every x (row) the candidates y stand in the columns": log_n
                - F.cross_entropy(scores.T, target),
                "the positive is missing from the denominator": log_n - (off - scores.diagonal()).mean(),
                "N counts the negatives only: the positive is one of the N candidates": (
                    torch.log(torch.tensor(float(n - 1))) - loss
                ),
            },
            what="bound",
        )


@exercise
def same_class_share(check: Check, answer: Callable) -> None:
    """`answer(z, label, temperature) -> fraction`: how much of the repulsion is within the anchor's class."""
    n, tau = 12, 0.3
    z, label = check.random(2 * n, 6), check.integers(3, n).repeat(2)
    given = check.call(answer, z, label, tau)
    check.shape(given, (), "one number, between 0 and 1")
    logits, positive = _logits(z, tau), _positive(2 * n)
    negative = logits.scatter(1, positive[:, None], -torch.inf)
    same = label[:, None] == label
    expected = (negative.softmax(1) * same).sum(1).mean()
    counted = same & ~torch.eye(2 * n, dtype=torch.bool)
    plain = counted.scatter(1, positive[:, None], False).sum() / (2 * n * (2 * n - 2))
    check.close(
        given,
        expected,
        mistakes={
            "the positive counts as a negative: leave it out of the softmax": (logits.softmax(1) * same).sum(1).mean(),
            "the anchor counts as its own negative: leave k = i out": (
                _logits(z, tau, mask=False).scatter(1, positive[:, None], -torch.inf).softmax(1) * same
            )
            .sum(1)
            .mean(),
            "all negatives count alike: weigh each by its softmax at this temperature": plain,
            "this is the fraction of the OTHER classes": 1 - expected,
            "the rows are not of unit length": (
                (z @ z.T / tau)
                .fill_diagonal_(-torch.inf)
                .scatter(1, positive[:, None], -torch.inf)
                .softmax(1)
                .mul(same)
                .sum(1)
                .mean()
            ),
        },
        what="fraction",
    )
