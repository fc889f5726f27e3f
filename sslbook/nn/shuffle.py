"""Shuffling batch norm: keys are encoded in other batch-norm groups than their queries.

Batch statistics of a small group identify its members. If a query and its key shared a group, a contrastive loss could
be solved by comparing statistics instead of images. So the images of the keys are shuffled over the groups before they
are encoded, and the keys are put back in order.

He, Fan, Wu, Xie and Girshick, 2020, "Momentum contrast for unsupervised visual representation learning"
(arXiv:1911.05722), section 3.3.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.nn.batch_norm import BatchNorm
from sslbook.schedules import Clock


def needs_shuffling(encoder: nn.Module, batch_norm_groups: int) -> bool:
    """Whether an encoder normalizes over groups of the batch at all."""
    return batch_norm_groups > 1 and any(isinstance(module, BatchNorm) for module in encoder.modules())


@torch.no_grad()
def encode_shuffled(
    encoder: Callable[[Tensor], Tensor], x: Float[Tensor, "n channels h w"], index: Int[Tensor, "n"], clock: Clock
) -> Float[Tensor, "n *features"]:
    """Outputs of `encoder` for this process's images, computed with the global batch in a random order.

    The permutation is a function of the images, the epoch and the seed: the same in one process and in several.

    Args:
        encoder: maps images to one output each.
        x: this process's images.
        index: which images these are.
        clock: its seed and epoch are part of the permutation's key.
    """
    own = distributed.own_rows(len(x), x.device)
    u = rng.uniform(clock.seed, clock.epoch, distributed.all_gather(index), rng.METHOD, 1)
    order = u[:, 0].argsort(stable=True)
    shuffled = distributed.all_gather(x)[order[own]]
    return distributed.all_gather(encoder(shuffled))[order.argsort()[own]]
