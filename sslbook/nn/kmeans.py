"""Features of all images, and clusters of them.

Everything here gives the same in one process and in several: the images are shared out in whole batches, k-means runs
on process 0, and all get its answer.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.errors import UserError, at_least_one
from sslbook.schedules import Clock

DISTANCES_AT_ONCE = 2**25  # 128 MB: a million images have ten thousand million distances to ten thousand centroids
PERTURBATION = 1 / 1024  # what tells the two halves of a split cluster apart, as in faiss


def check_clusters(num_clusters: int, images: int) -> None:
    """A `UserError` if there are fewer images than clusters, or no clusters."""
    at_least_one(num_clusters=num_clusters)
    if num_clusters > images:
        raise UserError(f"{num_clusters} clusters of {images} images: ask for at most {images} (num_clusters)")


@torch.no_grad()
def kmeans(
    x: Float[Tensor, "n dim"], num_clusters: int, iterations: int, seed: int, spherical: bool = False
) -> tuple[Float[Tensor, "clusters dim"], Int[Tensor, "n"]]:
    """Lloyd's algorithm: so many centroids, and to which of them every row belongs.

    It starts from rows chosen with counter-based random numbers. A cluster that runs empty gets half of the largest one, as in faiss
    (which draws the cluster to split by size instead): its centroid twice, a little apart. With all features the same a
    cluster may stay empty even so. The distances are exact, and only some of them exist at a time.

    Args:
        x: the rows, the same in every process.
        num_clusters: how many clusters.
        iterations: how often centroids are moved.
        seed: of the first centroids.
        spherical: normalize the centroids and compare by inner product; for unit vectors.

    Raises:
        UserError: there are more clusters than rows, or rows are not finite.
    """
    check_clusters(num_clusters, len(x))
    if not x.isfinite().all():
        raise UserError("features to be clustered hold NaN or Inf: lower the learning rate")
    x = x.float()
    centroids = x.new_empty(num_clusters, x.shape[1])
    assignment = torch.empty(len(x), dtype=torch.int64, device=x.device)
    if distributed.is_main():
        with torch.autocast(x.device.type, enabled=False):
            centroids = x[rng.permutation(seed, 0, len(x))[:num_clusters].to(x.device)]
            centroids = F.normalize(centroids, dim=1) if spherical else centroids
            for _ in range(iterations):
                centroids = _move(x, nearest(x, centroids, spherical), centroids, spherical)
            assignment = nearest(x, centroids, spherical)
    return distributed.broadcast(centroids), distributed.broadcast(assignment)


def nearest(
    x: Float[Tensor, "n dim"], centroids: Float[Tensor, "clusters dim"], spherical: bool = False
) -> Int[Tensor, "n"]:
    """The centroid closest to every row, or (spherical) with the greatest inner product."""
    # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2), of which the first term is the same for all centroids.
    offset = torch.zeros_like(centroids[:, 0]) if spherical else centroids.square().sum(dim=1) / 2
    rows = max(1, DISTANCES_AT_ONCE // len(centroids))
    return torch.cat([(part @ centroids.T - offset).argmax(dim=1) for part in x.split(rows)])


def _move(
    x: Float[Tensor, "n dim"],
    assignment: Int[Tensor, "n"],
    centroids: Float[Tensor, "clusters dim"],
    spherical: bool,
) -> Float[Tensor, "clusters dim"]:
    """Every centroid to the mean of its rows, and the empty ones beside those of the largest clusters."""
    sums = torch.zeros_like(centroids, dtype=torch.float64)  # whose rounding leaves no trace of the order of summation
    for rows, clusters in zip(x.split(2**16), assignment.split(2**16)):
        sums.index_add_(0, clusters, rows.double())
    sizes = assignment.bincount(minlength=len(centroids))
    means = (sums / sizes.clamp(min=1)[:, None]).float()
    centroids = split_largest(torch.where(sizes[:, None] > 0, means, centroids), sizes)
    return F.normalize(centroids, dim=1) if spherical else centroids


def split_largest(
    centroids: Float[Tensor, "clusters dim"], sizes: Int[Tensor, "clusters"]
) -> Float[Tensor, "clusters dim"]:
    """Each empty cluster in turn takes half of what is then the largest one."""
    sizes, centroids = sizes.clone(), centroids.clone()
    sign = 1 - 2 * (torch.arange(centroids.shape[1], device=centroids.device) % 2)
    for empty in (sizes == 0).nonzero()[:, 0]:
        largest = sizes.argmax()
        sizes[empty] = sizes[largest] // 2
        sizes[largest] -= sizes[empty]
        centroids[empty] = centroids[largest] * (1 + sign * PERTURBATION)
        centroids[largest] = centroids[largest] * (1 - sign * PERTURBATION)
    return centroids


@torch.no_grad()
def pca_whiten(x: Float[Tensor, "n dim"], dim: int, power: float = -0.5) -> Float[Tensor, "n {dim}"]:
    """Rows projected on their first `dim` principal components, scaled to equal variance, then to unit length.

    DeepCluster, section 3.3, "Implementation details". `power` is the exponent of the components' variances by which
    they are scaled: -0.5 whitens, 0 leaves them as they are. Components without any variance become 0.
    """
    if dim > min(x.shape):
        raise UserError(f"{dim} principal components of {x.shape[0]} features of width {x.shape[1]}: ask for fewer")
    with torch.autocast(x.device.type, enabled=False):
        parts = x.split(2**16)
        mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(x)
        covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        for part in parts:
            centered = part.double() - mean
            covariance += centered.T @ centered / len(x)
        variances, components = torch.linalg.eigh(covariance)  # in ascending order
        variances, components = variances.flip(0)[:dim], components.flip(1)[:, :dim]
        real = variances > 1e-10 * variances[0]
        scale = torch.where(real, variances.clamp(min=1e-300) ** power, 0)
        matrix = (components * scale).float()
        return torch.cat([F.normalize((part.float() - mean.float()) @ matrix, dim=1) for part in parts])


@torch.no_grad()
def embed(
    network: nn.Module, data: Data, view: View, batch_size: int = 256
) -> tuple[Float[Tensor, "readable dim"], Int[Tensor, "readable"]]:
    """What the network in evaluation mode says of every image that is learned from, and which images these are.

    The processes share the images in whole batches, so that the numbers do not depend on how many there are, and all
    get all rows, in float32 on the network's device. Images that cannot be read are left out.

    Raises:
        UserError: there are fewer images than processes, or none can be read.
    """
    rank, processes = distributed.rank(), distributed.world_size()
    _check_processes(data.num_train)
    device = next(network.parameters()).device
    rows, seen = None, torch.zeros(data.num_train, dtype=torch.int64, device=device)
    with _mode(network, training=False), torch.autocast(device.type, enabled=False):
        for batch in data.evaluation_batches("pretrain", view, batch_size, device, rank=rank, world_size=processes):
            x = network(batch.views[0]).float()
            rows = x.new_zeros(data.num_train, x.shape[1]) if rows is None else rows
            rows[batch.index], seen[batch.index] = x, 1
    width = distributed.all_reduce_max(torch.tensor(0 if rows is None else rows.shape[1], device=device))
    if not width:
        raise UserError("none of the images can be read: check the folder and its files")
    if rows is None:
        rows = torch.zeros(data.num_train, int(width), device=device)
    index = distributed.all_reduce_sum(seen).nonzero()[:, 0]
    return distributed.all_reduce_sum(rows)[index], index


@torch.no_grad()
def embed_views(
    network: nn.Module, data: Data, views: tuple[View, ...], clock: Clock, batch_size: int = 256
) -> tuple[Float[Tensor, "views some dim"], Int[Tensor, "some"]]:
    """What the network in training mode says of the views that an epoch shows, and which images these are.

    As in training, every view has a pass of its own, a batch is shared by all processes, and the last incomplete one is
    left out. Batch norm's running statistics move along.
    """
    rank, processes = distributed.rank(), distributed.world_size()
    _check_processes(data.num_train)
    device = next(network.parameters()).device
    rows, seen = None, torch.zeros(data.num_train, dtype=torch.int64, device=device)
    size = min(batch_size, data.num_train) // processes * processes
    batches = data.batches(
        views, size, seed=clock.seed, epoch=clock.epoch, rank=rank, world_size=processes, device=device
    )
    with _mode(network, training=True), torch.autocast(device.type, enabled=False):
        for batch in batches:
            x = torch.stack([network(view).float() for view in batch.views], dim=1)
            x, index = distributed.all_gather(x), distributed.all_gather(batch.index)
            rows = x.new_zeros(data.num_train, *x.shape[1:]) if rows is None else rows
            rows[index], seen[index] = x, 1
    assert rows is not None
    index = seen.nonzero()[:, 0]
    return rows[index].transpose(0, 1), index


def _check_processes(images: int) -> None:
    processes = distributed.world_size()
    if images < processes:
        raise UserError(f"{images} images for {processes} processes: start at most {images}")


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Another mode for a while; afterwards every part is in the mode it was in before."""
    modes = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, was in modes:  # `module.train` would also wake up parts that are kept in evaluation mode
            part.training = was
