"""The exercises of the chapter *MoCo*."""

import torch
import torch.nn.functional as F

from sslbook.notebook.exercises import exercise


def _unit(x):
    return F.normalize(x, dim=1)


def _first(positive, negatives):
    return torch.cat([positive, negatives], dim=1)


@exercise(
    inputs=lambda r: [(2 * r.normal(6, 5), 3 * r.normal(6, 5), r.normal(9, 5), tau) for tau in (0.2, 0.07)],
    returns={"loss": "the mean over the queries is one number"},
    gradient=True,
    mistakes={
        "keys and queue are constants: detach them": {"stop": lambda x: x},
        "the gradient is stopped at the query: keys and queue are the constants": lambda q, k, queue, tau: (
            info_nce.solution(q.detach(), k, queue, tau) + 0 * (k.sum() + q.sum())
        ),
        "the rows are not of unit length: divide each by its norm first": {"unit": lambda x: x},
        "the columns are normalized: each row is one query or key, dim=1": {"unit": lambda x: F.normalize(x, dim=0)},
        "the other keys of the batch are no negatives here: only the queue is": lambda q, k, queue, tau: (
            F.cross_entropy(
                torch.cat([_unit(q) @ _unit(k.detach()).T, _unit(q) @ _unit(queue.detach()).T], 1) / tau,
                torch.arange(len(q)),
            )
        ),
        "the positive is missing in the denominator: K + 1 candidates": lambda q, k, queue, tau: (
            ((_unit(q) @ _unit(queue.detach()).T) / tau).logsumexp(1) - (_unit(q) * _unit(k.detach())).sum(1) / tau
        ).mean(),
        "the temperature multiplies: divide by it": {"power": 1},
        "the target is the wrong column: the positive stands where you put it": {
            "join": lambda positive, negatives: torch.cat([negatives, positive], dim=1)
        },
        "the sum over the queries: take the mean": lambda q, k, queue, tau: (
            len(q) * info_nce.solution(q, k, queue, tau)
        ),
    },
)
def info_nce(q, k, queue, tau, *, unit=_unit, stop=lambda x: x.detach(), power=-1, join=_first):
    """`(q, k, queue, tau) -> loss`: cross-entropy of each query's own key among it and the queue."""
    q, k, queue = unit(q), unit(stop(k)), unit(stop(queue))
    logits = join((q * k).sum(1, keepdim=True), q @ queue.T) * tau**power
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


@exercise(
    inputs=lambda r: [(r.normal(8, 3), 2, r.normal(4, 3)), (r.normal(8, 3), 6, r.normal(4, 3))],
    returns={"queue": "as many rows as before", "pointer": "where the next key goes"},
    mistakes={
        "it does not wrap around: the position is taken modulo the size": lambda queue, pointer, k: (
            torch.cat([queue[:pointer], k, queue[pointer + len(k) :]])[: len(queue)],
            (pointer + len(k)) % len(queue),
        ),
        "the pointer does not move": lambda queue, pointer, k: (push.solution(queue, pointer, k)[0], pointer),
        "the pointer is not taken modulo the size": lambda queue, pointer, k: (
            push.solution(queue, pointer, k)[0],
            pointer + len(k),
        ),
        "the rows move up: in a ring they stay, and only the pointer moves": lambda queue, pointer, k: (
            torch.cat([queue[len(k) :], k]),
            pointer,
        ),
        "the keys enter in reverse order: the first of them goes to the pointer": lambda queue, pointer, k: (
            push.solution(queue, pointer, k.flip(0))
        ),
        "the pointer stands at the oldest row, which is the first to be replaced": lambda queue, pointer, k: (
            push.solution(queue, pointer + 1, k)
        ),
        "the newest keys are overwritten: the pointer stands at the oldest": {"sign": -1},
        "the queue grows: its oldest rows must go": lambda queue, pointer, k: (torch.cat([queue, k]), pointer + len(k)),
    },
)
def push(queue, pointer, k, *, sign=1):
    """`(queue, pointer, k) -> (queue, pointer)`: the keys replace the oldest rows of a ring."""
    at = (pointer + sign * torch.arange(len(k)) - int(sign < 0)) % len(queue)
    queue = queue.clone()
    queue[at] = k
    return queue, (pointer + len(k)) % len(queue)


@exercise(
    inputs=lambda r: [(r.uniform(n) + 0.1, m) for n, m in ((6, 0.9), (10, 0.5), (4, 0.99))],
    returns={"bound": "one number"},
    mistakes={
        "the sum starts with m^1: after the update m of the latest step is still missing": {"first": 0},
        "the latest step has the weight m, not its square": {"first": 2},
        "the weights are powers of m: a step is forgotten little by little": lambda lengths, m: m * lengths.sum(),
        "the sum over the steps, not their mean": lambda lengths, m: lag_bound.solution(lengths, m) / len(lengths),
        "the order: the latest step has the largest weight": {"order": lambda x: x},
        "this is m / (1 - m) times the longest step, a weaker bound": lambda lengths, m: m / (1 - m) * lengths.max(),
        "the weights 1 - m belong to the average of the weights, not to the lag": lambda lengths, m: (
            (1 - m) * lag_bound.solution(lengths, m)
        ),
        "this is the root of the sum of squares, the value for a random walk": lambda lengths, m: (
            m ** (torch.arange(len(lengths)) + 1) * lengths.flip(0)
        ).norm(),
    },
)
def lag_bound(lengths, m, *, first=1, order=lambda x: x.flip(0)):
    """`(lengths, m) -> bound` of the distance of query and key encoder after steps of these lengths, oldest first."""
    return (m ** (torch.arange(len(lengths)) + first) * order(lengths)).sum()


@exercise(
    inputs=lambda r: [(torch.tensor([1.0, 0.9, 0.7, 0.4]), 16, 0.2), (torch.tensor([0.99, 0.95]), 5, 0.07)],
    returns={"loss": "one number"},
    mistakes={
        "the positive is missing among the candidates: 1 + ...": {"own": 0.0},
        "each age has `per_age` keys": lambda cosines, per_age, tau: stale_loss.solution(cosines, 1, tau),
        "the positive has the cosine 1: subtract it before you divide by tau": {"positive": 0.0},
        "the mean over the keys: a softmax sums": [
            lambda cosines, per_age, tau: torch.log(1 + ((cosines - 1) / tau).exp().mean()),
            lambda cosines, per_age, tau: torch.log(1 + per_age * ((cosines - 1) / tau).exp().mean()),
        ],
        "divide the cosines by the temperature": [
            lambda cosines, per_age, tau: stale_loss.solution(cosines, per_age, 1.0),
            lambda cosines, per_age, tau: stale_loss.solution(cosines, per_age, 1 / tau),
        ],
        "the logarithm is missing": lambda cosines, per_age, tau: stale_loss.solution(cosines, per_age, tau).exp(),
        "this is the probability of the positive: the loss is minus its logarithm": lambda cosines, per_age, tau: (
            -stale_loss.solution(cosines, per_age, tau)
        ).exp(),
        "the sign: a key that is far away makes the loss smaller": lambda cosines, per_age, tau: stale_loss.solution(
            2 - cosines, per_age, tau
        ),
        "this is log(K + 1), the value when all keys are equally old": lambda cosines, per_age, tau: torch.log(
            torch.tensor(1.0 + per_age * len(cosines))
        ),
    },
)
def stale_loss(cosines, per_age, tau, *, own=1.0, positive=1.0):
    """`(cosines, per_age, tau) -> loss` of a network that gives all images one feature, which moves with the steps."""
    return torch.log(own + per_age * ((cosines - positive) / tau).exp().sum())


def _orders(r, n):
    return r.uniform(n).argsort()


@exercise(
    inputs=lambda r: [(r.normal(8, 2), _orders(r, 8), 2), (r.normal(12, 3), _orders(r, 12), 3)],
    returns={"keys": "one row an image, in the order of x"},
    mistakes={
        "the keys are still shuffled: put them back in order": {"back": lambda keys, order: keys},
        "indexing by the order once more shuffles again: use its argsort": {"back": lambda keys, order: keys[order]},
        "the variance divides by n, as batch norm's does in training: correction=0": {"correction": 1},
        "shuffled by the inverse: the groups are chunks of x[order]": lambda x, order, groups: shuffled.solution(
            x, order.argsort(), groups
        ),
        "`groups` is the number of chunks, not their size": lambda x, order, groups: shuffled.solution(
            x, order, len(x) // groups
        ),
        "a chunk is contiguous: the first rows of the shuffled batch are one group": lambda x, order, groups: (
            shuffled.solution(x, order.view(-1, groups).T.flatten(), groups)
        ),
        "only the mean is removed: divide by the standard deviation": {"scale": lambda s: 1.0},
        "divided by the variance: divide by its root": {"scale": torch.square},
        "not shuffled at all: the groups are those of the queries": lambda x, order, groups: shuffled.solution(
            x, torch.arange(len(x)), groups
        ),
        "one group: the statistics are those of the whole batch": lambda x, order, groups: shuffled.solution(
            x, order, 1
        ),
    },
)
def shuffled(x, order, groups, *, correction=0, scale=lambda s: s, back=lambda keys, order: keys[order.argsort()]):
    """`(x, order, groups) -> keys`: batch norm over `groups` chunks of the shuffled rows, back in order."""
    chunks = [(c - c.mean(0)) / scale(c.std(0, correction=correction)) for c in x[order].chunk(groups)]
    return back(torch.cat(chunks), order)


def _cross(q, k, tau, unit=_unit, turn=lambda s: s):
    return F.cross_entropy(turn(unit(q) @ unit(k).T) / tau, torch.arange(len(q)))


@exercise(
    inputs=lambda r: [tuple(r.normal(6, 4) for _ in range(4)) + (tau,) for tau in (0.2, 1.0)],
    returns={"loss": "one number"},
    gradient=True,
    mistakes={
        "a query must match the key of the other view": lambda q_1, q_2, k_1, k_2, tau: symmetrized.solution(
            q_1, q_2, k_2, k_1, tau
        ),
        "the keys are constants: detach them": {"stop": lambda k: k},
        "the rows are not of unit length: divide each by its norm first": {"unit": lambda x: x},
        "transposed: a query chooses among the keys, so its row holds the keys": {"turn": lambda s: s.T},
        "the sum over the queries: take the mean": lambda q_1, q_2, k_1, k_2, tau: (
            len(q_1) * symmetrized.solution(q_1, q_2, k_1, k_2, tau)
        ),
        "the factor is 2 tau for each direction": {"factor": lambda tau: tau},
        "the factor 2 tau is missing": {"factor": lambda tau: 1.0},
        "only one direction: add the other": lambda q_1, q_2, k_1, k_2, tau: (
            2 * tau * _cross(q_1, k_2.detach(), tau) + 0 * (q_2.sum() + k_1.sum())
        ),
    },
)
def symmetrized(
    q_1, q_2, k_1, k_2, tau, *, stop=lambda k: k.detach(), factor=lambda tau: 2 * tau, unit=_unit, turn=lambda s: s
):
    """`(q_1, q_2, k_1, k_2, tau) -> loss` of version 3: each query against the other view's keys of the batch."""
    return factor(tau) * sum(_cross(q, stop(k), tau, unit, turn) for q, k in ((q_1, k_2), (q_2, k_1)))
