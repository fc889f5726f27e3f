"""The parts shared by MAE's descendants are MAE's."""

import torch

from sslbook.methods import mae
from sslbook.nn import VisionTransformer, decoders
from sslbook.nn.decoders import PixelDecoder, random_mask, take
from sslbook.schedules import Clock


def test_the_decoder_is_maes() -> None:
    backbone = VisionTransformer(16, 4, 16, 1, 2)
    torch.manual_seed(0)
    ours = PixelDecoder(backbone, 16, 32, 2, 4)
    torch.manual_seed(0)
    theirs = mae.Decoder(16, 32, 2, 4, 4, (4, 4))
    visible, hidden = random_mask(torch.arange(3), 16, 0.75, Clock(seed=4))
    tokens = torch.randn(3, 5, 16)
    assert torch.equal(ours(tokens, visible, hidden, (4, 4)), theirs(tokens, visible, hidden, (4, 4)))


def test_masks_and_patches_are_maes() -> None:
    clock = Clock(step=7, steps_per_epoch=2, seed=5)
    for ours, theirs in zip(
        random_mask(torch.arange(9), 10, 0.9, clock), mae.random_mask(torch.arange(9), 10, 0.9, clock)
    ):
        assert torch.equal(ours, theirs)
    images, index = torch.randn(2, 3, 8, 12), torch.tensor([[5, 0], [1, 1]])
    assert torch.equal(decoders.patchify(images, 4), mae.patchify(images, 4))
    patches = mae.patchify(images, 4)
    assert torch.equal(take(patches, index), mae.take(patches, index))
    assert torch.equal(decoders.normalize_patches(patches), mae.normalize_patches(patches))
