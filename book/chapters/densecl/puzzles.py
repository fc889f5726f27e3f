"""What can be read from nine patches, in the order of the image or shuffled."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sslbook.book.chapters.densecl.variants import common_share
from sslbook.data.loader import Data
from sslbook.data.patch_grid import NUM_PATCHES, cut_patches
from sslbook.evaluation import linear
from sslbook.methods.base import Method
from sslbook.methods.jigsaw import permutation_set
from sslbook.methods.pirl import PIRL
from sslbook.schedules import Clock

TRAIN, TEST, ORDERS = 700, 300, 10
PENALTY = (1e-2,)


@torch.no_grad()
def patch_features(method: Method, data: Data) -> Float[Tensor, "n 9 dim"]:
    """The backbone's features of the nine patches of training images, not augmented, in the order of the image."""
    view = replace(method.views()[-1], crop=None, flip=0.0, color_jitter=(0.0,) * 4, grayscale=0.0)
    network, device = method.backbone.eval(), next(method.parameters()).device
    found = []
    for batch in data.evaluation_batches("train", view, device=device):
        patches = cut_patches(batch.views[0], batch.index, method.cell_size, method.patch_size, Clock())
        h = network(rearrange(patches, "n p c h w -> (n p) c h w"))
        found.append(rearrange(h, "(n p) d -> n p d", p=NUM_PATCHES))
        if sum(map(len, found)) >= TRAIN + TEST:
            break
    network.train()
    return torch.cat(found)[: TRAIN + TEST]


@torch.no_grad()
def puzzle_features(method: PIRL, h: Float[Tensor, "n 9 dim"]) -> Float[Tensor, "n out"]:
    """PIRL's g of patch features in the order given."""
    return F.normalize(method.puzzle_projector(method.patch_projector(h).flatten(1)), dim=1)


def effective_weight(method: PIRL) -> Float[Tensor, "out patches_times_dim"]:
    """The two linear layers of g as one matrix that acts on the nine patch features."""
    second = method.puzzle_projector.weight.view(-1, NUM_PATCHES, method.patch_projector.out_features)
    return torch.einsum("opk,kd->opd", second, method.patch_projector.weight).flatten(1)


def read_puzzles(method: Method, data: Data) -> dict[str, float]:
    """Linear probes (%): the position of a patch from its features; which of ten orders, from the features of all
    nine; for PIRL also from g, with the cosine of g between two orders, of one image and of two."""
    h = patch_features(method, data)
    position = torch.arange(NUM_PATCHES).repeat(len(h))
    flat = h.flatten(0, 1).cpu()
    cut = TRAIN * NUM_PATCHES
    found = {"position of a patch": _probe(flat[:cut], position[:cut], flat[cut:], position[cut:])}
    which = torch.arange(len(h)) * 7 % ORDERS
    orders = permutation_set(100)[:ORDERS][which].to(h.device)
    shuffled = h[torch.arange(len(h), device=h.device)[:, None], orders]
    found["order, nine patches"] = _halves(shuffled.flatten(1).cpu(), which)
    if isinstance(method, PIRL):
        a = puzzle_features(method, shuffled)
        b = puzzle_features(method, shuffled.flip(1))
        found["order, g"] = _halves(a.cpu(), which)
        found["cosine, two orders"] = (a * b).sum(1).mean().item()
        found["cosine, two images"] = (a * b.roll(1, 0)).sum(1).mean().item()
        found["common weights"] = 100 * common_share(effective_weight(method), NUM_PATCHES)
    return found


def _halves(x: Tensor, y: Tensor) -> float:
    return _probe(x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:])


def _probe(x: Tensor, y: Tensor, test_x: Tensor, test_y: Tensor) -> float:
    return linear.probe(x, y, test_x, test_y, penalties=PENALTY).accuracy
