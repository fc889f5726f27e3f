import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sslbook import distributed, rng
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.nn import convert_batch_norm
from sslbook.nn import kmeans as kmeans_module
from sslbook.nn.kmeans import embed, embed_views, kmeans, pca_whiten, split_largest
from sslbook.schedules import Clock

VIEW = View.center(16)


def literal(x: Tensor, clusters: int, iterations: int, spherical: bool) -> tuple[list[list[float]], list[int]]:
    """Lloyd's algorithm, row by row."""

    def unit(row: list[float]) -> list[float]:
        return [v / math.hypot(*row) for v in row] if spherical else row

    def assign() -> list[int]:
        nearest = []
        for row in x.tolist():
            if spherical:
                scores = [sum(a * b for a, b in zip(row, c)) for c in centroids]
            else:
                scores = [-sum((a - b) ** 2 for a, b in zip(row, c)) for c in centroids]
            nearest.append(scores.index(max(scores)))
        return nearest

    centroids = [unit(x[i].tolist()) for i in rng.permutation(3, 0, len(x))[:clusters]]
    for _ in range(iterations):
        assignment = assign()
        for j in range(clusters):
            members = [row for row, cluster in zip(x.tolist(), assignment) if cluster == j]
            assert members, "this data should leave no cluster empty"
            centroids[j] = unit([sum(column) / len(members) for column in zip(*members)])
    return centroids, assign()


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize(("n", "clusters", "iterations"), [(37, 5, 3), (5, 5, 1), (9, 1, 2), (20, 4, 0)])
def test_kmeans_equals_literal_lloyd(n: int, clusters: int, iterations: int, spherical: bool, monkeypatch) -> None:
    x = torch.randn(n, 3, dtype=torch.float64)
    x = (F.normalize(x, dim=1) if spherical else x).float()
    expected, places = literal(x.double(), clusters, iterations, spherical)
    centroids, assignment = kmeans(x, clusters, iterations, 3, spherical)
    torch.testing.assert_close(centroids, torch.tensor(expected))
    assert assignment.tolist() == places
    monkeypatch.setattr(kmeans_module, "DISTANCES_AT_ONCE", 7)  # one row at a time, or a few
    torch.testing.assert_close(kmeans(x, clusters, iterations, 3, spherical)[0], centroids)


def test_finds_well_separated_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    centers = 100 * torch.randn(6, 8, generator=generator)
    x = (centers[:, None] + torch.randn(6, 50, 8, generator=generator)).flatten(0, 1)
    assert 4 not in rng.permutation(5, 0, 300)[:12] // 50  # none of the first centroids lies in the fifth cluster
    _, assignment = kmeans(x, 12, 30, 5)
    for cluster in range(12):
        assert len((torch.arange(300) // 50)[assignment == cluster].unique()) <= 1


def test_empty_clusters_take_half_of_the_largest() -> None:
    centroids = torch.tensor([[1.0, 2.0], [9.0, 9.0], [3.0, 4.0], [8.0, 8.0]])
    split = split_largest(centroids, torch.tensor([10, 0, 4, 0]))
    up, down = 1 + 1 / 1024, 1 - 1 / 1024
    first, second = torch.tensor([1.0 * up, 2.0 * down]), torch.tensor([1.0 * down, 2.0 * up])
    torch.testing.assert_close(split[1], first)
    torch.testing.assert_close(split[2], centroids[2])
    # The rest of the largest has 5 of 10, as many as the new one and more than 4: it is split once more.
    torch.testing.assert_close(split[3], second * torch.tensor([up, down]))
    torch.testing.assert_close(split[0], second * torch.tensor([down, up]))
    assert torch.equal(split_largest(centroids, torch.tensor([1, 1, 1, 1])), centroids)


def num_filled_clusters(iterations: int) -> int:
    x = torch.cat([torch.zeros(100, 2), torch.randn(20, 2) + 3])
    x[rng.permutation(0, 0, 120)[12:]] += 0.1 * torch.randn(108, 2)
    x[rng.permutation(0, 0, 120)[:12]] = 1.0  # twelve centroids begin on the same point
    return len(kmeans(x, 12, iterations, 0)[1].unique())


def test_without_splitting_clusters_stay_empty(monkeypatch) -> None:
    assert num_filled_clusters(30) == 12
    torch.manual_seed(0)
    kept = num_filled_clusters(3)
    monkeypatch.setattr(kmeans_module, "split_largest", lambda centroids, sizes: centroids)
    torch.manual_seed(0)
    removed = num_filled_clusters(3)
    assert kept >= 6
    assert removed <= 4


def test_identical_rows_give_finite_centroids() -> None:
    centroids, assignment = kmeans(torch.ones(6, 2), 4, 5, 0)
    assert centroids.isfinite().all()
    assert ((assignment >= 0) & (assignment < 4)).all()
    centroids, _ = kmeans(torch.zeros(6, 2), 4, 5, 0, spherical=True)
    assert centroids.isfinite().all()


class Largest(TorchDispatchMode):
    """Records the number of values in the largest tensor that any operation returns."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.values = max(self.values, tensor.numel())
        return out


def test_distances_are_computed_in_chunks(monkeypatch) -> None:
    monkeypatch.setattr(kmeans_module, "DISTANCES_AT_ONCE", 2**12)
    x = torch.randn(2000, 4)
    with Largest() as largest:
        kmeans(x, 500, 2, 0)  # a million distances
    assert largest.values <= 8000  # the features themselves


def test_whitened_features_have_equal_variances() -> None:
    x = torch.randn(500, 6) @ torch.randn(6, 6) + 10
    y = pca_whiten(x, 4)
    torch.testing.assert_close(y.norm(dim=1), torch.ones(500))
    # Literally: components of the covariance, from the greatest variance on.
    values, vectors = np.linalg.eigh(np.cov(x.double().numpy().T, bias=True))
    expected = (
        (x.double().numpy() - x.double().numpy().mean(axis=0)) @ vectors[:, ::-1][:, :4] / values[::-1][:4] ** 0.5
    )
    white = torch.from_numpy(expected)
    torch.testing.assert_close(white.T @ white / 500, torch.eye(4, dtype=torch.float64))
    agreement = (F.normalize(white, dim=1) * y).sum(dim=0).abs()  # the sign of a component is arbitrary
    torch.testing.assert_close(agreement, (y.double() ** 2).sum(dim=0), rtol=1e-4, atol=1e-4)


def test_whitening_of_collapsed_features() -> None:
    assert torch.equal(pca_whiten(torch.ones(7, 4), 2), torch.zeros(7, 2))
    line = torch.randn(7, 1) @ torch.randn(1, 4)
    y = pca_whiten(line, 3)
    assert y.isfinite().all()
    torch.testing.assert_close(y[:, 0].abs(), torch.ones(7))


def test_rejects_invalid_input() -> None:
    with pytest.raises(UserError, match="9 clusters of 8 images: ask for at most 8"):
        kmeans(torch.randn(8, 2), 9, 1, 0)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6)
    norm.running_mean = torch.randn(6)
    layers = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 6), norm)
    layers[1].eval()  # a part that is kept in evaluation mode
    convert_batch_norm(layers)
    return layers


def _clusters(images: int, batch_size: int) -> tuple[Tensor, ...]:
    data = Data(shapes=Shapes(num_train=images, num_test=4, size=16))
    model = network()
    x, index = embed(model, data, VIEW, batch_size)
    assert model.training
    assert not model[1].training
    views, shown = embed_views(model, data, (View(size=16), View(size=16)), Clock(seed=3), batch_size)
    white = pca_whiten(x, 3)
    torch.manual_seed(distributed.rank())  # the processes' own generators must not matter
    centroids, assignment = kmeans(white, 4, 5, 1)
    assert isinstance(model[2].running_mean, Tensor)
    return x, index, centroids, assignment, views, shown, model[2].running_mean


@pytest.mark.parametrize(("images", "batch_size"), [(50, 7), (16, 64)])
def test_two_processes_equal_one(images: int, batch_size: int, pool) -> None:
    batch_size += batch_size % 2 if images == 50 else 0
    one = _clusters(images, batch_size)
    for got in pool.run(_clusters, images, batch_size):
        for a, b in zip(got[:4], one[:4]):
            assert torch.equal(a, b)
        for a, b in zip(got[4:], one[4:]):
            torch.testing.assert_close(a, b)
    assert one[1].tolist() == list(range(images))


def test_embed_returns_the_networks_features() -> None:
    data = Data(shapes=Shapes(num_train=20, num_test=4, size=16))
    model = network()
    x, _ = embed(model, data, VIEW, 8)
    model.eval()
    for batch in data.evaluation_batches("train", VIEW, 20):
        torch.testing.assert_close(x, model(batch.views[0]))
    views, index = embed_views(model, data, (VIEW, View(size=16)), Clock(seed=3), 8)
    model.train()
    assert views.shape == (2, 16, 6)  # four images are left over
    batch = next(iter(data.batches((VIEW, View(size=16)), 8, seed=3, epoch=0)))
    for i in range(2):
        places = torch.searchsorted(index, batch.index)
        torch.testing.assert_close(views[i, places], model(batch.views[i]))


def test_unreadable_images_are_left_out(tmp_path: Path) -> None:
    for i in range(12):
        Image.fromarray(np.full((16, 16, 3), 10 * i, dtype=np.uint8)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "03.png").write_bytes(b"not an image")
    with pytest.warns(UserWarning, match="unreadable"):
        x, index = embed(network(), Data(folder=tmp_path, workers=0), VIEW, 4)
    assert index.tolist() == [0, 1, 2, *range(4, 12)]
    assert len(x) == 11
    assert (x.norm(dim=1) > 0).all()


def _one_image() -> torch.Tensor:
    return embed(network(), Data(shapes=Shapes(num_train=1, num_test=4, size=16)), VIEW)[0]


def test_more_processes_than_images(pool) -> None:
    for rows in pool.run(_one_image):
        torch.testing.assert_close(rows, _one_image())
