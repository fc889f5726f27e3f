"""Solutions that a reader may well write, though no chapter does: every check accepts them."""

import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook.book.chapters.byol import exercises as byol
from sslbook.book.chapters.decorrelation import exercises as decorrelation
from sslbook.book.chapters.deepcluster import exercises as deepcluster
from sslbook.book.chapters.learning_without_labels import exercises as first
from sslbook.book.chapters.mae import exercises as mae
from sslbook.book.chapters.relative_location import exercises as location
from sslbook.book.chapters.rotation import exercises as rotation
from sslbook.book.chapters.simclr import exercises as simclr
from sslbook.book.chapters.simsiam import exercises as simsiam
from sslbook.book.chapters.swav import exercises as swav
from sslbook.notebook.exercises import Exercise


def siamese_loss_by_numbers(p_1: Tensor, p_2: Tensor, z_1: Tensor, z_2: Tensor) -> Tensor:
    both = [(p / p.norm(dim=1, keepdim=True), z.numpy(force=True)) for p, z in ((p_1, z_2), (p_2, z_1))]
    return -sum((p * torch.tensor(z / np.linalg.norm(z, axis=1, keepdims=True))).sum() for p, z in both) / 2 / len(p_1)


def targets_by_loops(views: Tensor) -> tuple[np.ndarray, list[float]]:
    means = [np.mean([v / np.linalg.norm(v) for v in image.numpy()], axis=0) for image in views]
    return np.array([m / np.linalg.norm(m) for m in means]), [float(np.linalg.norm(m)) for m in means]


def round_by_solving(W: Tensor, S: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    G = torch.linalg.solve(S + A, S).T  # S and A are symmetric
    V = torch.linalg.lstsq(W @ (S + A) @ W.T, W @ S @ W.T).solution.T
    return torch.inverse(V) @ W @ G, V


def vote_by_loops(s: Tensor, y: Tensor, k: int, tau: float, classes: int) -> np.ndarray:
    scores = np.zeros((len(s), classes))
    for row, each in enumerate(s.tolist()):
        for j in sorted(range(len(each)), key=lambda j: -each[j])[:k]:
            scores[row, int(y[j])] += math.exp((each[j] - max(each)) / tau)
    return scores


def vote_as_softmax(s: Tensor, y: Tensor, k: int, tau: float, classes: int) -> Tensor:
    top, index = s.topk(k, dim=1)
    return ((top / tau).softmax(1)[:, :, None] * F.one_hot(y[index], classes)).sum(1)


def merge_by_sorting_pairs(best: Tensor, index: Tensor, s: Tensor, start: int, k: int) -> tuple[list, list]:
    rows = []
    for b, i, new in zip(best.tolist(), index.tolist(), s.tolist()):
        pairs = [*zip(b, i), *zip(new, range(start, start + len(new)))]
        rows.append(sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:k])
    return [[p[0] for p in row] for row in rows], [[p[1] for p in row] for row in rows]


def standardize_with_epsilon(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = train.mean(0), train.std(0)
    return (train - mean) / (std + 1e-6), (test - mean) / (std + 1e-6)


def standardize_with_epsilon_in_the_root(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    mean, root = train.mean(0), (train.var(0) + 1e-5).sqrt()
    return (train - mean) / root, (test - mean) / root


def probe_by_autograd(w: Tensor, z: Tensor, y: Tensor, decay: float) -> Tensor:
    w = w.clone().requires_grad_()
    loss = F.cross_entropy(z @ w, y) + decay / 2 * w[:-1].square().sum()
    return torch.autograd.grad(loss, w)[0]


def needed_by_trying(p: float, half: float, z: float) -> int:
    n = 1
    while z * math.sqrt(p * (1 - p) / n) > half:
        n += 1
    return n


def paired_by_counting(a: Tensor, b: Tensor) -> tuple[float, float]:
    d = [int(x) - int(y) for x, y in zip(a, b)]
    return statistics.mean(d), statistics.stdev(d) / math.sqrt(len(d))


def nt_xent_by_blocks(z: Tensor, tau: float) -> Tensor:
    a, b = F.normalize(z, dim=1, eps=1e-6).chunk(2)
    eye = torch.eye(len(a), dtype=torch.bool)
    aa, bb = ((x @ x.T / tau).masked_fill(eye, -1e9) for x in (a, b))
    y = torch.arange(len(a))
    ask_a = F.cross_entropy(torch.cat([a @ b.T / tau, aa], 1), y)
    ask_b = F.cross_entropy(torch.cat([b @ a.T / tau, bb], 1), y)
    return (ask_a + ask_b) / 2


def nt_xent_row_by_row(z: Tensor, tau: float) -> Tensor:
    z = z / z.norm(dim=1, keepdim=True)
    n, losses = len(z) // 2, []
    for i in range(2 * n):
        others = torch.stack([z[i] @ z[k] / tau for k in range(2 * n) if k != i])
        losses.append(torch.logsumexp(others, 0) - z[i] @ z[(i + n) % (2 * n)] / tau)
    return sum(losses) / len(losses)


def anchor_by_autograd(z: Tensor, i: int, j: int, tau: float) -> Tensor:
    z_i = z[i].clone().requires_grad_()
    s = torch.stack([z_i @ z[k] / tau for k in range(len(z)) if k != i])
    return torch.autograd.grad(s.logsumexp(0) - z_i @ z[j] / tau, z_i)[0]


def supcon_by_autograd(z: Tensor, label: Tensor, i: int, tau: float) -> Tensor:
    z_i = z[i].clone().requires_grad_()
    others = [k for k in range(len(z)) if k != i]
    s = torch.stack([z_i @ z[k] / tau for k in others])
    positives = [s[a] for a, k in enumerate(others) if label[k] == label[i]]
    return torch.autograd.grad(s.logsumexp(0) - sum(positives) / len(positives), z_i)[0]


def bound_by_probabilities(scores: Tensor) -> float:
    s = scores.numpy().astype(np.float64)
    p = np.exp(s) / np.exp(s).sum(1, keepdims=True)
    return float(np.log(len(s) * np.diag(p)).mean())


def floor_with_epsilon(joint: Tensor) -> float:
    given = joint / joint.sum(0)
    return -float((joint * torch.log(given + 1e-9)).sum())


def floor_of_labels_with_epsilon(y: Tensor) -> float:
    p = torch.bincount(y) / len(y)
    return -float((p * torch.log(p + 1e-9)).sum())


def floor_as_a_difference(joint: Tensor) -> Tensor:
    def entropy(p: Tensor) -> Tensor:
        return -torch.xlogy(p, p).sum()

    return entropy(joint) - entropy(joint.sum(0))


def rotate_in_numpy(x: Tensor) -> np.ndarray:
    return np.concatenate([np.rot90(x.numpy(), k, axes=(2, 3)) for k in range(4)])


def patchify_by_unfold(x: Tensor, P: int) -> Tensor:
    columns = F.unfold(x, P, stride=P)  # (n, 3 * P * P, patches), color first
    return columns.unflatten(1, (3, P * P)).permute(0, 3, 2, 1).flatten(2)


def inverse_by_scatter(u: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    order = torch.argsort(u, dim=1)
    positions = torch.arange(u.shape[1]).expand_as(u).contiguous()
    return u.topk(keep, dim=1, largest=False).indices.int(), torch.zeros_like(order).scatter(1, order, positions)


def loss_of_selected(prediction: Tensor, patches: Tensor, mask: Tensor) -> Tensor:
    own = patches[mask == 1]
    target = (own - own.mean(1, keepdim=True)) / (own.std(1, keepdim=True) + 1e-6)
    return F.mse_loss(prediction[mask.bool()], target)


def block_by_loops(top: Tensor, left: Tensor, height: int, width: int, grid: int) -> list[list[bool]]:
    return [
        [t <= r < t + height and c <= q < c + width for r in range(grid) for q in range(grid)]
        for t, c in zip(top.tolist(), left.tolist())
    ]


def limits_by_small_numbers(sigma: Tensor) -> list[Tensor]:
    s, d = sigma.double(), sigma.double().diagonal().diag()
    return [s @ torch.linalg.inv((1 - rho) * s + rho * d) for rho in (1e-7, 1 - 1e-7)]


def unexplained_by_covariances(z: Tensor, target: Tensor) -> float:
    both = np.cov(torch.cat([z, target], 1).numpy().T, bias=True)
    k = z.shape[1]
    return np.trace(both[k:, k:] - both[k:, :k] @ np.linalg.solve(both[:k, :k], both[:k, k:]))


def predictor_by_singular_values(C: Tensor, boost: float) -> Tensor:
    u, c, v = torch.linalg.svd(C)
    return u @ c.sqrt().diag() @ v + boost * c.max().sqrt() * torch.eye(len(C))


def alignment_by_numpy(V: Tensor, C: Tensor) -> list[float]:
    values, U = np.linalg.eigh(C.numpy())
    columns = [-U[:, j] for j in np.argsort(-values)]  # the sign of an eigenvector is free
    return [float(u @ V.numpy() @ u / np.linalg.norm(V.numpy() @ u)) for u in columns]


def shares_of_directions(x: Tensor) -> np.ndarray:
    s = np.linalg.svd(x.numpy() - x.numpy().mean(0), compute_uv=False)
    return s / s.sum()


def covariance_by_pairs(z: Tensor) -> Tensor:
    d, columns = z.shape[1], (z - z.mean(0)).T
    pairs = [(columns[j] @ columns[k] / (len(z) - 1)) ** 2 for j in range(d) for k in range(d) if j != k]
    return torch.stack(pairs).sum() / d


def covariance_gradient_by_autograd(z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(covariance_by_pairs(z), z)[0]


def balance_on_a_grid(rho: float, lam: float, mu: float, gamma: float) -> float:
    sigma = np.linspace(0, 2 * gamma, 2_000_001)
    return sigma[np.argmin(2 * lam * (1 - rho) * sigma**2 + mu * np.maximum(0, gamma - sigma))]


def barlow_by_batch_norm(z_1: Tensor, z_2: Tensor, lam: float) -> Tensor:
    z_1, z_2 = (F.batch_norm(z, None, None, training=True, eps=1e-6) for z in (z_1, z_2))
    errors = (z_1.T @ z_2 / len(z_1) - torch.eye(z_1.shape[1])).square()
    return (1 - lam) * errors.diagonal().sum() + lam * errors.sum()


def swapped_by_loops(s_1: Tensor, s_2: Tensor, q_1: Tensor, q_2: Tensor, tau: float) -> Tensor:
    total = s_1.sum() * 0
    for s, q in ((s_1, q_2), (s_2, q_1)):
        for i in range(len(s)):
            total = total - (q[i].detach() * torch.log(torch.softmax(s[i] / tau, 0))).sum() / (2 * len(s))
    return total


def sinkhorn_by_factors(scores: Tensor, epsilon: float, iterations: int) -> np.ndarray:
    kernel = np.exp((scores.double() - scores.max()).numpy() / epsilon)
    u, v = np.ones(len(kernel)), np.ones(kernel.shape[1])
    for _ in range(iterations):
        v = 1 / (kernel.T @ u)
        u = 1 / (kernel @ v)
    return u[:, None] * kernel * v


def dual_by_exponents(S: Tensor, a: Tensor, b: Tensor, epsilon: float) -> float:
    kernel = torch.outer((-a / epsilon).exp(), (-b / epsilon).exp()) * (S / epsilon).exp()
    return float(epsilon / math.e * kernel.sum() + a.mean() + b.mean())


def first_order_by_a_small_number(S: Tensor, epsilon: float) -> Tensor:
    q = swav.sinkhorn.solution(1e-4 * S, epsilon, 5)
    return 1 / S.shape[1] + 1e4 * (q - 1 / S.shape[1])


def critical_by_projectors(s_1: Tensor, s_2: Tensor, tau: float) -> Tensor:
    left, right = (torch.eye(n) - 1 / n for n in s_1.shape)
    a, b = (left @ s @ right for s in (s_1, s_2))
    return 2 * tau * torch.sum(a * b) / (torch.sum(a * a) + torch.sum(b * b))


def pairs_by_indices(h: Tensor) -> Tensor:
    columns = [index for k in (0, 1, 2, 3, 5, 6, 7, 8) for index in (4, k)]
    return h[:, columns].reshape(8 * len(h), -1)


def layout_floor_by_counting(rho: float, shifted: bool) -> float:
    known = rho**2 if shifted else rho
    given = np.full((25, 8), (1 - known) / 25)  # what one sees points at position 0 to 7, or at none
    given[range(8), range(8)] += known
    joint = given / 8
    return -(joint * np.log(joint / joint.sum(1, keepdims=True))).sum()


def shift_by_numpy(green: Tensor, red: Tensor) -> list[float]:
    S = np.stack(np.gradient(green.numpy()), -1).reshape(-1, 2)
    return np.linalg.lstsq(S, (red - green).numpy().ravel(), rcond=None)[0].tolist()


def greedy_by_loops(chosen: Tensor, pool: Tensor) -> int:
    return max(min(sum(a != b for a, b in zip(x, y)) for y in chosen.tolist()) for x in pool.tolist())


def whitened_by_the_unbiased_covariance(h: Tensor) -> Tensor:
    values, V = torch.linalg.eigh(torch.cov(h.T))
    return torch.cdist(h @ V / values.sqrt(), h @ V / values.sqrt())


UNUSUAL: list[tuple[Exercise, Callable]] = [
    (first.knn_vote, vote_by_loops),
    (first.knn_vote, vote_as_softmax),
    (first.merge_neighbors, merge_by_sorting_pairs),
    (first.posterior_with_copies, lambda p, m: 1 / (1 + (1 / p - 1) / m)),
    (first.nearest_neighbor_error, lambda eta: torch.tensor([1 - eta**2 - (1 - eta) ** 2])),
    (first.probe_gradient, probe_by_autograd),
    (first.standardize, standardize_with_epsilon),
    (first.standardize, standardize_with_epsilon_in_the_root),
    (first.images_needed, needed_by_trying),
    (first.images_needed, lambda p, half, z: np.ceil(p * (1 - p) * (z / half) ** 2)),
    (first.images_needed, lambda p, half, z: math.floor(p * (1 - p) * (z / half) ** 2) + 1),
    (first.paired_difference, paired_by_counting),
    (first.participation_ratio, lambda h: torch.cov(h.T).trace() ** 2 / torch.linalg.matrix_norm(torch.cov(h.T)) ** 2),
    (first.optimism_of_two, lambda p, n, rho: math.sqrt(p * (1 - p) / n) * math.sqrt(1 - rho) / math.sqrt(math.pi)),
    (simclr.nt_xent, nt_xent_by_blocks),
    (simclr.nt_xent, nt_xent_row_by_row),
    (simclr.nt_xent, lambda z, tau: nt_xent_by_blocks(z.double(), tau)),
    (simclr.anchor_gradient, anchor_by_autograd),
    (simclr.through_normalization, lambda u, g: torch.autograd.functional.jacobian(lambda v: v / v.norm(), u).T @ g),
    (simclr.information_bound, bound_by_probabilities),
    (simclr.loss_floor, lambda n, tau: torch.log1p((2 * n - 2) * torch.exp(torch.tensor(-2 / tau)))),
    (simclr.false_negatives, lambda p, n: 2 * (n - 1) * sum(float(x) ** 2 for x in p)),
    (simclr.supcon_gradient, supcon_by_autograd),
    (rotation.rotate_without_rot90, rotate_in_numpy),
    (rotation.bayes_accuracy, lambda w, folds: np.clip(45 / (w * folds), 0, 1)),
    (
        rotation.gradient_variance,
        lambda g: (g.mean(1).var(0, correction=0).sum(), g.var(1, correction=0).mean(0).sum()),
    ),
    (rotation.mean_variance, lambda B, V, n, m: B / n + V * (1 / m - 1 / 4) * 4 / 3 / n),
    (rotation.loss_floor, floor_with_epsilon),
    (rotation.loss_floor, floor_as_a_difference),
    (rotation.noise_floor, lambda e: (1 - e, -sum(q * math.log(q) for q in (1 - e, e / 3, e / 3, e / 3)))),
    (mae.patchify, patchify_by_unfold),
    (mae.mask, inverse_by_scatter),
    (mae.loss, loss_of_selected),
    (mae.block, block_by_loops),
    (mae.simmim_cost, lambda L, d, rho: (6 * L * d + L * L) / (6 * (1 - rho) * L * d + ((1 - rho) * L) ** 2)),
    (mae.absolute_error_minimizer, lambda x: min(x.tolist(), key=lambda c: float((x - c).abs().mean()))),
    (mae.linear_limits, limits_by_small_numbers),
    (mae.unpredictable_loss, lambda s, v: 1 - s / (s + v)),
    (
        byol.byol_loss,
        lambda p, z: 2 - 2 * (F.normalize(p, dim=1, eps=1e-6) * F.normalize(z.detach(), dim=1)).sum(1).mean(),
    ),
    (byol.half_life, lambda m: np.log2(0.5) / np.log2(m)),
    (byol.unexplained, unexplained_by_covariances),
    (byol.fixed_points, lambda lam, s, eta: np.sort(np.roots([lam + s, -lam, eta]))),
    (byol.survivors, lambda lam, s, eta: sum(x * x - 4 * eta * (x + s) > 0 for x in lam.tolist())),
    (byol.direct_predictor, predictor_by_singular_values),
    (byol.alignment, alignment_by_numpy),
    (byol.effective_rank, lambda x: np.exp(-sum(q * np.log(q) for q in shares_of_directions(x)))),
    (decorrelation.covariance_loss, covariance_by_pairs),
    (decorrelation.covariance_gradient, covariance_gradient_by_autograd),
    (decorrelation.balance, balance_on_a_grid),
    (decorrelation.barlow_loss, barlow_by_batch_norm),
    (decorrelation.whiten, lambda z: np.linalg.svd(z - z.mean(0), full_matrices=False)[0] * (len(z) - 1) ** 0.5),
    (decorrelation.gap, lambda rows, columns: sum(r**4 for r in rows.tolist()) - sum(c**4 for c in columns.tolist())),
    (swav.swapped_loss, swapped_by_loops),
    (swav.sinkhorn, sinkhorn_by_factors),
    (swav.dual_value, dual_by_exponents),
    (swav.convergence_rate, lambda Q: sorted(np.linalg.eigvals(Q.numel() * Q.T @ Q).real)[-2]),
    (swav.first_order, first_order_by_a_small_number),
    (swav.critical_epsilon, critical_by_projectors),
    (swav.smallest_entropy, lambda n, k: -math.log(min(1, n / k))),
    (swav.multicrop, lambda R, r, v: [(2 + v * r**2 / R**2) / 2, v + 1 + v + 1]),
    (deepcluster.whitened, whitened_by_the_unbiased_covariance),
    (deepcluster.floor, floor_of_labels_with_epsilon),
    (simsiam.loss, siamese_loss_by_numbers),
    (simsiam.targets, targets_by_loops),
    (simsiam.power_round, round_by_solving),
    (simsiam.rounds, lambda a, b, factor: np.log10(factor) / (np.log10(a) - np.log10(b))),
    (simsiam.thermometer, lambda z: (F.normalize(z, dim=1).std(0) * len(z[0]) ** 0.5).mean()),  # over n - 1
    (simsiam.smaller_side, lambda s: min(np.roots([1, -1, s * s / 4]).real)),
    (simsiam.rates, lambda t, T, lr: [lr * min(1, 10 * (t + 1) / T) * math.cos(math.pi * t / T / 2) ** 2, lr]),
    (simsiam.equal_compute, lambda b: 1 - 1 / (2 + b)),
    (location.pairs, pairs_by_indices),
    (location.twins, lambda g: (len(g) * 0.125, np.dot(g, np.log(g)) / 8)),
    (location.layout_floor, layout_floor_by_counting),
    (location.normalize, lambda x: F.layer_norm(x, x.shape[2:])),
    (location.shift, shift_by_numpy),
    (
        location.largest_average,
        lambda n, N: (
            n * sum(2 * (N // n + (v < N % n)) * (N - N // n - (v < N % n)) for v in range(n)) / (2 * N * (N - 1))
        ),
    ),
    (location.greedy_distance, greedy_by_loops),
    (location.ambiguity, lambda d, q: np.sum((1 - q) ** np.array(d, dtype=float)) / 2),
]


@pytest.mark.parametrize(("check", "answer"), UNUSUAL, ids=[f"{e.name}-{i}" for i, (e, _) in enumerate(UNUSUAL)])
def test_unusual_solutions_pass(check: Exercise, answer: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    check(answer)
    assert f"{check.name}: passed" in capsys.readouterr().out
