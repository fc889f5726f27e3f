"""Images with two shapes, true locations of cells, and what the ablations of the chapter on DenseCL change."""

import pytest
import torch

from sslbook.book.chapters.densecl.puzzles import effective_weight, puzzle_features
from sslbook.book.chapters.densecl.scenes import SIZE, Scenes, cell_centers, cell_shapes, places, truth
from sslbook.book.chapters.densecl.variants import Matched, OwnSum, Pairs, common_share, summed_nce
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.methods.densecl import DenseCL
from sslbook.methods.pirl import nce
from sslbook.nn import ConvNet
from sslbook.schedules import Clock

VIEW = View(size=16, crop=(0.4, 1.0))
OPTIONS = {"projector_dim": 8, "queue_size": 16, "batch_norm_groups": 1}


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    return Scenes(num_train=40, num_test=2)


def test_scenes_show_two_shapes_where_their_masks_say(scenes: Scenes) -> None:
    found = scenes.train
    assert found.images.shape == (40, 3, SIZE, SIZE)
    for mask, pair, middle in zip(found.masks, found.shapes, found.centers):
        assert set(mask.unique().tolist()) == {0, *(1 + pair).tolist()}
        at = mask[tuple(middle.long().unbind(1))]
        assert ((at == 0) | (at == 1 + pair)).all()  # the middle of a shape may lie in a hole of it
    background = found.images.permute(0, 2, 3, 1)[found.masks == 0]
    assert (background - background[0].int()).abs().max() <= 6
    assert cell_centers(found).sum(1).tolist() == [2] * 40
    assert (cell_shapes(found)[found.masks.flatten(1).sum(1) == 0] == 0).all()


def test_a_cell_is_nearest_to_itself_and_a_flip_reverses_its_row() -> None:
    index = torch.arange(200)
    whole = View(size=16, crop=(1.0, 1.0), ratio=(1.0, 1.0))
    found = truth(whole, index, 4, 32)
    straight = torch.arange(16)
    mirrored = straight.view(4, 4).flip(1).flatten()
    same = (found.nearest == straight).all(1)
    assert (same | (found.nearest == mirrored).all(1)).all()
    assert 60 < same.sum() < 140
    assert found.seen.all()
    assert found.near.sum(2).unique().tolist() == [1]


def test_cells_lie_in_the_crop(scenes: Scenes) -> None:
    at, box = places(VIEW, torch.arange(50), 1, 4, SIZE)
    low, extent = box[:, None, :2], box[:, None, 2:]
    assert ((at > low) & (at < low + extent)).all()


def batch_of(scenes: Scenes):
    return next(iter(scenes.data().batches((VIEW, VIEW), 8, seed=0, epoch=0)))


def test_matched_by_features_is_densecl(scenes: Scenes) -> None:
    losses = []
    for kind in (DenseCL, Matched):
        torch.manual_seed(0)
        method = kind(ConvNet(4), VIEW, **OPTIONS)
        losses.append(method(batch_of(scenes), Clock())["loss"])
        rows = method.dense_queue.rows if kind is DenseCL else rows
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(method.dense_queue.rows, rows)


def test_other_matches_and_negatives_change_the_dense_loss_alone(scenes: Scenes) -> None:
    found = {}
    for match in ("features", "projections", "random", "identity", "truth"):
        torch.manual_seed(0)
        method = Matched(ConvNet(4), VIEW, match=match, negatives="cell", **OPTIONS)
        method.pairs = torch.zeros(8, 16, dtype=torch.int64)
        found[match] = method(batch_of(scenes), Clock())
    assert len({out["dense_loss"].item() for out in found.values()}) == 5
    assert len({out["global_loss"].item() for out in found.values()}) == 1
    assert found["projections"]["dense_loss"] == min(out["dense_loss"] for out in found.values())


def test_pairs_of_the_right_class_are_pure() -> None:
    data = Data(shapes=Shapes(num_train=120, num_test=1))
    batch = next(iter(data.batches((VIEW, VIEW), 32, seed=0, epoch=0)))
    purity = {}
    for kind in ("class", "random"):
        torch.manual_seed(0)
        method = Pairs(
            ConvNet(4),
            VIEW,
            16,
            positives=kind,
            num_clusters=4,
            min_cluster=5,
            pool_size=20,
            num_negatives=8,
            **OPTIONS,
        )
        method.setup(data)
        out = method(batch, Clock())
        purity[kind] = out["purity"].item(), out["false negatives"].item()
    assert purity["class"] == (100, 0)
    assert purity["random"][0] < 50


def test_a_common_similarity_costs_nothing_with_a_sum_over_negatives() -> None:
    scores = torch.randn(6, 30)
    torch.testing.assert_close(summed_nce(scores), summed_nce(scores + 9))
    log_sum = torch.logsumexp(scores[0, 1:], 0)
    torch.testing.assert_close(summed_nce(scores[:1]), nce(scores[:1], log_sum))
    assert nce(scores + 9, log_sum) > 10 * nce(scores, log_sum)


def test_the_two_layers_of_a_puzzle_are_one() -> None:
    torch.manual_seed(0)
    method = OwnSum(ConvNet(4), VIEW, View(size=24), 8, 7, projector_dim=5, num_negatives=4)
    h = torch.randn(3, 9, 16)
    bias = method.puzzle_projector(method.patch_projector.bias.repeat(9)[None])
    by_hand = torch.nn.functional.normalize(h.flatten(1) @ effective_weight(method).T + bias, dim=1)
    torch.testing.assert_close(puzzle_features(method, h), by_hand)
    assert common_share(torch.ones(2, 9 * 4), 9) == pytest.approx(1)
    assert common_share(torch.randn(50, 9 * 40), 9) == pytest.approx(1 / 9, rel=0.1)
