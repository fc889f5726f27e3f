from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook import nn as nets
from sslbook import rng
from sslbook.data.patch_grid import cut_patches
from sslbook.errors import UserError
from sslbook.methods.jigsaw import Jigsaw, permutation_set, shuffle
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, make, make_batch, transformer

CASE = Case(
    options={"view": VIEW, "cell_size": 5, "patch_size": 4, "num_permutations": 8, "patch_dim": 8},
    command={
        "method.backbone": CONVNET,
        "method.cell_size": 5,
        "method.patch_size": 4,
        "method.num_permutations": 8,
        "method.patch_dim": 8,
    },
    learned=lambda method, batch, out: bool(out["jigsaw_accuracy"] > 95),
    overfit={"patch_dim": 32},
    corners=[(2, 0.05, {})],  # one image in each process
    other_backbones=[transformer],
)


def distances(permutations: Tensor) -> Tensor:
    """Hamming distances between all pairs."""
    pairs = (permutations[:, None] != permutations[None]).sum(dim=2)
    return pairs[~torch.eye(len(permutations), dtype=torch.bool)]


def test_permutations_have_large_distances() -> None:
    for size, least in ((10, 8), (300, 5)):
        permutations = permutation_set(size)
        assert torch.equal(permutations.sort(dim=1).values, torch.arange(9).expand(size, 9))
        assert torch.equal(permutations, permutation_set(size))
        at_random = torch.rand(size, 9, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
        assert distances(permutations).min() >= least > distances(at_random).min()
        assert distances(permutations).float().mean() > max(8.0, float(distances(at_random).float().mean()))


def test_permutation_set_is_chosen_greedily() -> None:
    """Against the definition, one candidate at a time."""
    pool = rng.uniform(0, 0, torch.arange(40), rng.METHOD, 9).argsort(dim=1, stable=True).tolist()
    chosen = [pool[0]]
    for _ in range(9):

        def score(candidate: list[int]) -> tuple[int, int]:
            away = [sum(a != b for a, b in zip(candidate, other)) for other in chosen]
            return min(away), sum(away)

        chosen.append(max(pool, key=score))
    assert permutation_set(10, candidates=40).tolist() == chosen
    nearest = [min(sum(a != b for a, b in zip(p, q)) for q in chosen[:i]) for i, p in enumerate(chosen) if i]
    assert all(a >= b for a, b in pairwise(nearest))  # a later one is never farther from the rest


def test_shuffle_is_per_image() -> None:
    patches = torch.arange(18.0).view(2, 9, 1, 1, 1)
    order = torch.stack([torch.arange(9).flip(0), torch.arange(9).roll(1)])
    got = shuffle(patches, order).flatten(1).tolist()
    assert got == [[8.0 - i for i in range(9)], [9.0 + (i - 1) % 9 for i in range(9)]]


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 3])
def test_loss_is_cross_entropy_over_permutations(n: int) -> None:
    method = make("jigsaw").double().eval()
    batch = make_batch(method, n)
    batch = batch._replace(views=(batch.views[0].double(),))
    patches = cut_patches(batch.views[0], batch.index, 5, 4, Clock())
    loss = 0.0
    for i in range(n):
        u = float(rng.uniform(0, 0, batch.index[i : i + 1], rng.METHOD, 1))
        which = int(8 * u)
        parts = []
        for position in range(9):
            patch = patches[i, int(method.permutations[which, position])]
            parts.append(method.patch_layer(method.backbone(patch[None]))[0])
        loss -= float(F.softmax(method.head(torch.cat(parts)), dim=0)[which].log()) / n
    assert float(method(batch, Clock())["loss"]) == pytest.approx(loss, rel=1e-5)  # the method measures in float32


def accuracy_after_training(identical: bool) -> float:
    method = make("jigsaw")
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    colors = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    colors = colors[:1].expand(9, 3) if identical else colors
    x = colors.view(3, 3, 3).permute(2, 0, 1).repeat_interleave(5, dim=1).repeat_interleave(5, dim=2)
    x = F.pad(x, (0, 1, 0, 1))
    total = 0.0
    for step in range(40):
        batch = make_batch(method, 16, seed=step)
        clock = Clock(step, 40)  # an epoch per step: new permutations every time
        out = method(batch._replace(views=(x + 0.1 * batch.views[0],)), clock)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        total += float(out["jigsaw_accuracy"]) / 10 if step >= 30 else 0.0
    return total


def test_identical_patches_cannot_be_ordered() -> None:
    assert accuracy_after_training(identical=False) > 90
    assert accuracy_after_training(identical=True) < 25  # chance level: 12.5


def test_head_sizes_of_vissl() -> None:
    """VISSL's heads: 2048 to 1000 for a patch, 9000 to 2000 for all."""
    with torch.device("meta"):
        method = Jigsaw(nets.resnet50())
        assert method.patch_layer(torch.empty(18, 2048)).shape == (18, 1000)
        assert tuple(method.head.weight.shape) == (2000, 9000)
    assert method.permutations.shape == (2000, 9)
    assert distances(method.permutations[:500].cpu()).min() >= 4


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match="num_permutations is 1: use at least 2 and at most 5000"):
        make("jigsaw", num_permutations=1)
    with pytest.raises(UserError, match="at most 5000"):
        make("jigsaw", num_permutations=9**9)
    with pytest.raises(UserError, match="set patch_size to at least 1 and at most 5"):
        make("jigsaw", patch_size=6)
