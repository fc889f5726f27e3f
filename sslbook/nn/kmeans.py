"""K-means, PCA whitening, and the features of all training images that they are applied to.

The results do not depend on the number of processes: images are divided among them in whole batches, k-means runs on
process 0 and its result is broadcast.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.nn.modes import in_mode
from sslbook.nn.precision import full_precision
from sslbook.schedules import Clock

# A million images and 10,000 centroids have 10^10 distances. A block of 4 MB stays in a CPU's cache; a GPU takes 128 MB.
DISTANCES_AT_ONCE = 2**20
PERTURBATION = 1 / 1024  # relative distance between the two halves of a split cluster, as in faiss


def check_clusters(num_clusters: int, images: int) -> None:
    """Refuse more clusters than images.

    Raises:
        UserError: there are fewer images than clusters.
    """
    if num_clusters > images:
        raise UserError(f"{num_clusters} clusters of {images} images: ask for at most {images} (num_clusters)")


@torch.no_grad()
def kmeans(
    x: Float[Tensor, "n dim"], num_clusters: int, iterations: int, seed: int, spherical: bool = False
) -> tuple[Float[Tensor, "clusters dim"], Int[Tensor, "n"]]:
    """Lloyd's algorithm: the centroids, and the index of every row's cluster.

    The first centroids are random rows. A cluster that runs empty takes half of the largest one, as in faiss (where the
    cluster to split is sampled by size): both start from its centroid, a little apart. Distances are exact and computed
    in chunks.

    Args:
        x: the rows, the same in every process.
        num_clusters: number of clusters; some may stay empty if many rows are equal.
        iterations: updates of the centroids.
        seed: seed of the first centroids.
        spherical: normalize the centroids and compare by inner product; for unit vectors.

    Raises:
        UserError: there are more clusters than rows.
    """
    check_clusters(num_clusters, len(x))
    x = x.float()
    centroids = x.new_empty(num_clusters, x.shape[1])
    assignment = torch.empty(len(x), dtype=torch.int64, device=x.device)
    if distributed.is_main():
        with full_precision(x):
            centroids = x[rng.permutation(seed, 0, len(x))[:num_clusters].to(x.device)]
            centroids = F.normalize(centroids, dim=1) if spherical else centroids
            for _ in range(iterations):
                centroids = _move(x, nearest(x, centroids, spherical), centroids, spherical)
            assignment = nearest(x, centroids, spherical)
    return distributed.broadcast(centroids), distributed.broadcast(assignment)


def nearest(
    x: Float[Tensor, "n dim"], centroids: Float[Tensor, "clusters dim"], spherical: bool = False
) -> Int[Tensor, "n"]:
    """The index of the closest centroid for every row, or (spherical) of the one with the largest inner product."""
    # |x - c|^2 = |x|^2 - 2 (x c - |c|^2 / 2), of which the first term is the same for all centroids.
    offset = torch.zeros_like(centroids[:, 0]) if spherical else centroids.square().sum(dim=1) / -2
    rows = max(1, DISTANCES_AT_ONCE * (1 if x.device.type == "cpu" else 32) // len(centroids))
    return torch.cat([torch.addmm(offset, part, centroids.T).max(dim=1).indices for part in x.split(rows)])


def _move(
    x: Float[Tensor, "n dim"],
    assignment: Int[Tensor, "n"],
    centroids: Float[Tensor, "clusters dim"],
    spherical: bool,
) -> Float[Tensor, "clusters dim"]:
    """Moves every centroid to the mean of its rows, and fills empty clusters."""
    sums = torch.zeros_like(centroids, dtype=torch.float64)  # float64: the order of summation leaves no trace
    for rows, clusters in zip(x.split(2**12), assignment.split(2**12)):
        sums.index_add_(0, clusters, rows.double())
    sizes = assignment.bincount(minlength=len(centroids))
    means = (sums / sizes.clamp(min=1)[:, None]).float()
    centroids = split_largest(torch.where(sizes[:, None] > 0, means, centroids), sizes)
    return F.normalize(centroids, dim=1) if spherical else centroids


def split_largest(
    centroids: Float[Tensor, "clusters dim"], sizes: Int[Tensor, "clusters"]
) -> Float[Tensor, "clusters dim"]:
    """The centroids after each empty cluster in turn has taken half of what is then the largest one."""
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
def pca_whiten(x: Float[Tensor, "n width"], dim: int) -> Float[Tensor, "n {dim}"]:
    """Rows projected onto their first `dim` principal components, whitened, then normalized to unit length.

    DeepCluster, section 3.3, "Implementation details". Components without any variance become 0. `dim` is at most `width`.
    """
    with full_precision(x):
        parts = x.split(2**16)  # converted to float64 one after the other
        mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(x)
        covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
        for part in parts:
            centered = part.double() - mean
            covariance += centered.T @ centered / len(x)
        variances, components = torch.linalg.eigh(covariance)  # in ascending order
        variances, components = variances.flip(0)[:dim], components.flip(1)[:, :dim]
        real = variances > 1e-10 * variances[0]
        scale = torch.where(real, variances.clamp(min=1e-300) ** -0.5, 0)  # to unit variance
        matrix = (components * scale).float()
        return torch.cat([F.normalize((part.float() - mean.float()) @ matrix, dim=1) for part in parts])


def embed(
    network: nn.Module, data: Data, view: View, batch_size: int = 256
) -> tuple[Float[Tensor, "readable dim"], Int[Tensor, "readable"]]:
    """Features of all training images from the network in evaluation mode, and the indices of these images.

    Processes divide the images in whole batches, so that the numbers do not depend on how many processes there are.
    All get all rows, in float32 on the network's device. Unreadable images are left out.

    Raises:
        UserError: no image can be read.
    """
    rank, processes = distributed.rank(), distributed.world_size()
    device = next(network.parameters()).device
    batches = data.evaluation_batches("pretrain", view, batch_size, device, rank=rank, world_size=processes)
    rows, index = _collect(network, batches, data.num_train, training=False)
    return rows[:, 0], index


def embed_views(
    network: nn.Module, data: Data, views: tuple[View, ...], clock: Clock, batch_size: int = 256
) -> tuple[Float[Tensor, "views some dim"], Int[Tensor, "some"]]:
    """Features of an epoch's views from the network in training mode, and the indices of their images.

    As in training, every view has a forward pass of its own, processes divide each batch, and the last incomplete batch
    is left out. Batch norm's running statistics are updated.

    Raises:
        UserError: no image can be read, or there are fewer than processes.
    """
    rank, processes = distributed.rank(), distributed.world_size()
    device = next(network.parameters()).device
    size = min(batch_size, data.num_train) // processes * processes
    batches = data.batches(
        views, size, seed=clock.seed, epoch=clock.epoch, rank=rank, world_size=processes, device=device
    )
    rows, index = _collect(network, batches, data.num_train, training=True)
    return rows.transpose(0, 1), index


@torch.no_grad()
def _collect(
    network: nn.Module, batches: Iterable[Batch], num_images: int, training: bool
) -> tuple[Float[Tensor, "some views dim"], Int[Tensor, "some"]]:
    """Features of all processes' batches, in the order of the images, and the indices of these images."""
    device = next(network.parameters()).device
    rows, shown = torch.empty(0, 0, 0, device=device), torch.zeros(num_images, dtype=torch.int64, device=device)
    with in_mode(network, training), torch.autocast(device.type, enabled=False):
        for batch in batches:
            x = torch.stack([network(view).float() for view in batch.views], dim=1)
            rows = x.new_zeros(num_images, *x.shape[1:]) if not rows.numel() else rows
            rows[batch.index], shown[batch.index] = x, 1
    shape = distributed.all_reduce_max(torch.tensor(rows.shape, device=device)).tolist()
    if not shape[0]:
        raise UserError("none of the images can be read: check the folder and its files")
    rows = rows if rows.numel() else rows.new_zeros(shape)  # more processes than batches
    index = distributed.all_reduce_sum(shown).nonzero()[:, 0]
    return distributed.all_reduce_sum(rows)[index], index
