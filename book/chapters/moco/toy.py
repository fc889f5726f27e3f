"""A toy of MoCo in which batch norm leaks: images of a few noisy pixels and one constant pixel, two linear layers.

A pixel that is the same in every image shows, behind batch norm, the statistics of the group. The query can use them to
find its key, which was normalized by the same statistics.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

PIXELS, CHANNELS, HIDDEN, DIM, CLASSES = 4, 8, 64, 16, 8


def group_norm_over_images(h: Float[Tensor, "n pixels c"], groups: int) -> Float[Tensor, "n pixels c"]:
    """Batch norm without parameters, over contiguous groups of images and over all of their pixels."""
    chunks = h.reshape(groups, -1, h.shape[2])
    mean, var = chunks.mean(1, keepdim=True), chunks.var(1, keepdim=True, correction=0)
    return ((chunks - mean) / (var + 1e-5).sqrt()).view_as(h)


def two_views(n: int, generator: torch.Generator) -> tuple[list[Float[Tensor, "n pixels c"]], Int[Tensor, "n"]]:
    """Two views of n images and their classes: pixels of the image's code plus noise, and a pixel that is always 0."""
    label = torch.randint(CLASSES, (n,), generator=generator)
    code = 1.5 * torch.eye(CLASSES)[label] + 0.7 * torch.randn(n, CHANNELS, generator=generator)
    noise = torch.randn(2, n, PIXELS, CHANNELS, generator=generator)
    return [F.pad(code[:, None] + e, (0, 0, 0, 1)) for e in noise], label


def encode(weights: list[Tensor], x: Float[Tensor, "n pixels c"], groups: int) -> Float[Tensor, "n dim"]:
    first, shift, last = weights
    h = F.relu(group_norm_over_images(x @ first, groups) + shift)
    return F.normalize(h.flatten(1) @ last, dim=1)


def train(group: int, shuffle: bool, steps: int, seed: int, batch: int = 64, size: int = 512) -> dict[str, float]:
    """Train with groups of `group` images; loss and positives found at the end (in %), and kNN of the class (in %)."""
    generator = torch.Generator().manual_seed(seed)
    flat = (PIXELS + 1) * HIDDEN
    weights = [
        torch.randn(CHANNELS, HIDDEN, generator=generator) / CHANNELS**0.5,
        torch.zeros(HIDDEN),
        torch.randn(flat, DIM, generator=generator) / flat**0.5,
    ]
    key_weights = [w.clone() for w in weights]
    queue = F.normalize(torch.randn(size, DIM, generator=generator), dim=1)
    optimizer = torch.optim.Adam([w.requires_grad_() for w in weights], 1e-2)
    log = []
    for _ in range(steps):
        (x_q, x_k), _ = two_views(batch, generator)
        order = torch.randperm(batch, generator=generator) if shuffle else torch.arange(batch)
        q = encode(weights, x_q, batch // group)
        k = encode(key_weights, x_k[order], batch // group)[order.argsort()]
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], 1) / 0.1
        loss = F.cross_entropy(logits, torch.zeros(batch, dtype=torch.int64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(key_weights, weights):
                mine.lerp_(theirs, 0.02)
        queue = torch.cat([queue, k])[-size:]
        log.append((loss.item(), 100 * (logits.argmax(1) == 0).float().mean().item()))
    loss, found = torch.tensor(log[-20:]).mean(0).tolist()
    return {"loss": loss, "accuracy": found, "kNN": knn(weights, generator)}


@torch.no_grad()
def knn(weights: list[Tensor], generator: torch.Generator) -> float:
    """Accuracy of a vote of 20 neighbors, in %, with the statistics of all images at once."""
    (x, _), label = two_views(2000, generator)
    z = encode(weights, x, 1)
    nearest = (z[1500:] @ z[:1500].T).topk(20, dim=1).indices
    vote = F.one_hot(label[:1500][nearest], CLASSES).sum(1).argmax(1)
    return 100 * (vote == label[1500:]).float().mean().item()
