import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook import nn as nets
from sslbook.data.loader import Batch
from sslbook.errors import UserError
from sslbook.methods.pirl import IMAGE_NEGATIVES, PIRL, PUZZLE_NEGATIVES, nce, sample_negatives
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, NUM_IMAGES, VIEW, Case, make, make_batch, transformer

SMALL = {"cell_size": 5, "patch_size": 4, "projector_dim": 16, "num_negatives": 21}


def finds_images(method: PIRL, batch: Batch, out: dict[str, Tensor]) -> bool:
    """Every puzzle is nearest to its own image of the batch."""
    return bool(matches(method, batch) > 0.95)


def matches(method: PIRL, batch: Batch) -> float:
    """Fraction of puzzles whose features are nearest to those of their own image, among the images of the batch."""
    with torch.no_grad():
        f = F.normalize(method.projector(method.backbone(batch.views[0])), dim=1)
        g = F.normalize(method.puzzle(batch.views[1], batch.index, Clock()), dim=1)
    nearest = (g @ f.T).argmax(dim=1)
    return float((batch.index[nearest] == batch.index).float().mean())


CASE = Case(
    options={"view": VIEW, "puzzle_view": VIEW, **SMALL},
    command={"method.backbone": CONVNET, "method.cell_size": 5, "method.patch_size": 4, "method.num_negatives": 21},
    learned=finds_images,
    overfit={"projector_dim": 32, "temperature": 0.2},
    overfit_lr=5e-3,
    corners=[(2, 0.05, {}), (8, 0.05, {"num_negatives": 1})],
    other_backbones=[transformer],
)


@pytest.mark.parametrize(("n", "negatives", "temperature"), [(5, 7, 0.07), (1, 1, 0.5), (3, 2, 0.01)])
def test_nce_is_equation_4(n: int, negatives: int, temperature: float) -> None:
    scores = (2 * torch.rand(n, 1 + negatives, dtype=torch.float64) - 1) / temperature
    constant = math.exp(0.6 / temperature)  # in the place of the sum over the negatives

    def log_h(score: float) -> float:
        return score - math.log(math.exp(score) + constant)

    def log_not_h(score: float) -> float:
        return math.log(constant) - math.log(math.exp(score) + constant)

    expected = 0.0
    for row in scores.tolist():
        expected -= (log_h(row[0]) + sum(log_not_h(score) for score in row[1:])) / n
    got = float(nce(scores, torch.tensor(math.log(constant), dtype=torch.float64)))
    assert got == pytest.approx(expected, rel=1e-9)


def test_negatives_are_uniform_over_other_images() -> None:
    index = torch.arange(5).repeat(200)
    negatives = sample_negatives(torch.arange(5), 2000, 5, Clock(), PUZZLE_NEGATIVES)
    assert not (negatives == torch.arange(5)[:, None]).any()
    for i in range(5):
        share = negatives[i].bincount(minlength=5) / 2000
        assert share[[j for j in range(5) if j != i]].tolist() == pytest.approx([0.25] * 4, abs=0.04)
    batch = sample_negatives(index, 3, 5, Clock(), PUZZLE_NEGATIVES)
    assert torch.equal(batch[7], sample_negatives(index[7:8], 3, 5, Clock(), PUZZLE_NEGATIVES)[0])
    assert not torch.equal(batch, sample_negatives(index, 3, 5, Clock(), IMAGE_NEGATIVES))
    assert set(sample_negatives(torch.tensor([1]), 50, 2, Clock(), IMAGE_NEGATIVES).flatten().tolist()) == {0}


@torch.no_grad()
@pytest.mark.parametrize("index", [[3], [5, 9, 5]])  # an image may occur twice
def test_loss_and_memory_update(index: list[int]) -> None:
    method = make("pirl", puzzle_weight=0.3, momentum=0.8)
    batch = make_batch(method, len(index))._replace(index=torch.tensor(index))
    before = method.memory.rows.clone()
    f = F.normalize(method.projector(method.backbone(batch.views[0])), dim=1)
    g = F.normalize(method.puzzle(batch.views[1], batch.index, Clock()), dim=1)
    terms = []
    for v, stream in ((g, PUZZLE_NEGATIVES), (f, IMAGE_NEGATIVES)):
        negatives = sample_negatives(batch.index, 21, NUM_IMAGES, Clock(), stream).tolist()
        similar = [
            [math.exp(float(v[i] @ before[j]) / 0.07) for j in [own, *negatives[i]]] for i, own in enumerate(index)
        ]
        constant = 21 * sum(map(sum, similar)) / (22 * len(index))  # VISSL: the mean over positives and negatives
        total = 0.0
        for positive, *others in similar:
            total -= math.log(positive / (positive + constant)) / len(index)
            total -= sum(math.log(1 - e / (e + constant)) for e in others) / len(index)
        terms.append(total)
    out = method(batch, Clock())
    assert float(out["loss"]) == pytest.approx(0.3 * terms[0] + 0.7 * terms[1], rel=1e-4)
    for j in range(NUM_IMAGES):
        if j in index:
            last = max(i for i, own in enumerate(index) if own == j)
            expected = F.normalize(0.8 * before[j] + 0.2 * f[last], dim=0)
            torch.testing.assert_close(method.memory.rows[j], expected)
        else:
            assert torch.equal(method.memory.rows[j], before[j])


def test_partition_is_estimated_from_the_first_batch() -> None:
    method = make("pirl")
    assert method.log_sums.isinf().all()
    method(make_batch(method, 8), Clock())
    first = method.log_sums.clone()
    assert first.isfinite().all()
    method(make_batch(method, 8, seed=1), Clock())
    assert torch.equal(method.log_sums, first)


def test_patches_are_shuffled() -> None:
    method = make("pirl").eval()
    x = make_batch(method, 1).views[1].expand(30, -1, -1, -1)
    varied = method.puzzle(x, torch.arange(30), Clock()).detach()
    fixed = method.puzzle(x, torch.zeros(30, dtype=torch.int64), Clock()).detach()
    assert varied.std(dim=0).min() > 100 * fixed.std(dim=0).max()


def matches_after_training(puzzle_weight: float) -> float:
    method = make("pirl", puzzle_weight=puzzle_weight)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    colors = torch.randn(16, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    batch = make_batch(method, 16)._replace(index=torch.arange(16))
    batch = batch._replace(views=tuple(0.2 * view + colors for view in batch.views))
    for step in range(50):
        optimizer.zero_grad()
        method(batch, Clock(step, 50))["loss"].backward()  # an epoch per step: new puzzles every time
        optimizer.step()
    return matches(method, batch)


@pytest.mark.slow
def test_without_the_jigsaw_term_it_is_not_invariant() -> None:
    assert matches_after_training(0.5) > 0.6
    assert matches_after_training(0.0) < 0.3


def test_head_sizes_of_the_paper() -> None:
    """Section 3.2: 2048 to 128 for an image and for every patch, nine times 128 to 128 for the puzzle."""
    with torch.device("meta"):
        method = PIRL(nets.resnet50())
        heads = (method.projector, method.patch_projector, method.puzzle_projector)
        assert [tuple(head.weight.shape) for head in heads] == [(128, 2048), (128, 2048), (128, 9 * 128)]


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match="cell_size to at most 5"):
        make("pirl", cell_size=6)
