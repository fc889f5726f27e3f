import pytest
import torch

from sslbook.errors import UserError
from sslbook.nn import ResNet, VisionTransformer, timm_model
from sslbook.nn.mask_tokens import cell_side, masked_map, patch_side, require_maskable, token_dim


def swin() -> torch.nn.Module:
    pytest.importorskip("timm", reason="needs timm")
    return timm_model(
        "swin_tiny_patch4_window7_224",
        img_size=16,
        patch_size=2,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(2, 2),
        window_size=4,
        drop_path_rate=0.0,
    )


def test_the_sides_of_patches_and_cells() -> None:
    assert (patch_side(swin()), cell_side(swin()), token_dim(swin())) == (2, 4, 8)
    vit = VisionTransformer(16, 4, 32, 1, 2)
    assert (patch_side(vit), cell_side(vit), token_dim(vit)) == (4, 4, 32)


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_without_a_mask_it_is_the_network(name: str) -> None:
    net = swin().eval() if name == "swin" else VisionTransformer(16, 4, 16, 2, 2, pool="mean").eval()
    images = torch.randn(2, 3, 16, 16)
    nothing = torch.zeros(2, (16 // patch_side(net)) ** 2, dtype=torch.bool)
    maps = masked_map(net, images, nothing, torch.randn(token_dim(net)))
    assert maps.shape == (2, 16, 4, 4)
    torch.testing.assert_close(maps.mean(dim=(2, 3)), net(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_what_is_hidden_is_not_seen(name: str) -> None:
    net = swin().eval() if name == "swin" else VisionTransformer(16, 4, 16, 2, 2).eval()
    side = patch_side(net)
    mask = torch.zeros(1, 16 // side, 16 // side, dtype=torch.bool)
    mask[:, : 8 // side, 8 // side :] = True  # the upper right quarter
    token = torch.randn(token_dim(net))
    images = torch.randn(1, 3, 16, 16)
    other = images.clone()
    other[:, :, :8, 8:] = 9.0
    maps = masked_map(net, images, mask.flatten(1), token)
    assert torch.equal(masked_map(net, other, mask.flatten(1), token), maps)
    assert not torch.equal(masked_map(net, images, mask.flatten(1), token + torch.randn_like(token)), maps)
    other[:, :, 9, 9] = images[:, :, 9, 9] + 1  # a pixel that is shown
    assert not torch.equal(masked_map(net, other, mask.flatten(1), token), maps)


def test_others_are_refused() -> None:
    with pytest.raises(UserError, match=r"Anything .* cannot use a ResNet: choose .*swin"):
        require_maskable(ResNet(18, width=4), "Anything")
