import torch

from sslbook.nn.mask_tokens import gather_tokens
from sslbook.nn.patches import normalize_patches, patchify, unpatchify


def test_gather_tokens_image_by_image() -> None:
    tokens, index = torch.randn(2, 5, 3), torch.tensor([[4, 0], [1, 1]])
    some = gather_tokens(tokens, index)
    for i in range(2):
        assert torch.equal(some[i], torch.stack([tokens[i, position] for position in index[i].tolist()]))


def test_patchify_orders_values_pixel_by_pixel() -> None:
    images = torch.randn(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    for row in range(4):
        for column in range(6):
            patch = (row // 2) * 3 + column // 2
            start = ((row % 2) * 2 + column % 2) * 3
            assert torch.equal(patches[:, patch, start : start + 3], images[:, :, row, column])
    assert torch.equal(unpatchify(patches, 2, (2, 3)), images)


def test_normalized_patches_have_mean_0_and_variance_1() -> None:
    patches = normalize_patches(3 + 2 * torch.randn(2, 5, 48))
    torch.testing.assert_close(patches.mean(dim=-1), torch.zeros(2, 5), rtol=0, atol=1e-5)
    torch.testing.assert_close(patches.var(dim=-1), torch.ones(2, 5), rtol=1e-4, atol=1e-4)
