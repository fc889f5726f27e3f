import math

import pytest
import torch

from sslbook.errors import UserError
from sslbook.nn import VisionTransformer, vit_base, vit_giant, vit_huge, vit_large, vit_small, vit_tiny
from sslbook.nn.vit import resample_positions, sincos_positions


@pytest.mark.parametrize(
    ("factory", "parameters"),
    # Published counts (arXiv:2010.11929, table 1; arXiv:2012.12877, table 1) to the digit, as timm counts them.
    [
        (vit_tiny, 5_524_416),
        (vit_small, 21_665_664),
        (vit_base, 85_798_656),
        (vit_large, 303_301_632),
        (vit_huge, 630_764_800),
        (vit_giant, 1_011_202_432),  # "g/14, 1011 M" (arXiv:2106.04560, table 2)
    ],
)
def test_published_parameter_counts(factory, parameters: int) -> None:
    with torch.device("meta"):
        network = factory(positions="learned")
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_timm_weights_give_timm_features(pool: str) -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    theirs = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, depth=2, global_pool="token"
    ).eval()
    ours = VisionTransformer(32, 8, 192, 2, 3, positions="learned", pool=pool).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    tokens = theirs.forward_features(x)
    expected = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)
    torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-5)


def test_sincos_positions_against_definition() -> None:
    dim, height, width = 8, 2, 3
    table = sincos_positions(dim, height, width)
    for row in range(height):
        for column in range(width):
            expected = []
            for position in (column, row):
                for function in (math.sin, math.cos):
                    expected += [function(position / 10000 ** (i / (dim // 4))) for i in range(dim // 4)]
            torch.testing.assert_close(table[row * width + column], torch.tensor(expected))
    with pytest.raises(UserError, match="use 8"):
        sincos_positions(10, 2, 2)


def test_fixed_positions_are_saved_buffers() -> None:
    network = VisionTransformer(16, 4, 16, 1, 2)
    assert "pos_embed" in network.state_dict()
    assert "pos_embed" not in dict(network.named_parameters())
    assert network.pos_embed[0, 0].abs().max() == 0  # the class token has no position


def test_tokens_can_be_dropped_and_reordered() -> None:
    network = VisionTransformer(16, 4, 16, 2, 2, pool="mean").eval()
    x = torch.randn(2, 3, 16, 16)
    tokens = network.embed(x)
    assert tokens.shape == (2, 16, 16)
    assert network.encode(tokens[:, :5]).shape == (2, 6, 16)
    torch.testing.assert_close(network(x), network.encode(tokens.flip(1))[:, 1:].mean(dim=1), rtol=1e-4, atol=1e-5)
    # Dropped patches have no influence.
    x[:, :, 4:, :] = 7.0
    torch.testing.assert_close(network.encode(network.embed(x)[:, :4]), network.encode(tokens[:, :4]))


def test_any_size_that_divides_into_patches() -> None:
    network = VisionTransformer(16, 4, 16, 1, 2)
    assert network(torch.randn(1, 3, 8, 24)).shape == (1, 16)
    with pytest.raises(UserError, match=r"18x30 .* nearest size that works is 16x32"):
        network(torch.randn(1, 3, 18, 30))
    with pytest.raises(UserError, match="nearest size that works is 16x16"):
        VisionTransformer(15, 4, 16, 1, 2)
    with pytest.raises(UserError, match="3 heads"):
        VisionTransformer(16, 4, 16, 1, 3)


def test_resampled_positions_keep_rows() -> None:
    table = torch.arange(4.0).repeat_interleave(4).view(16, 1)  # the row's number
    assert resample_positions(table, (4, 4), (4, 4)) is table
    wider = resample_positions(table, (4, 4), (4, 8)).view(4, 8)
    torch.testing.assert_close(wider, torch.arange(4.0)[:, None].expand(4, 8))
    rows = resample_positions(table, (4, 4), (8, 4)).view(8, 4)
    assert bool((rows.diff(dim=0) > 0).all())


def test_positions_offset_resamples_by_scale_factor() -> None:
    """DINO's table for a larger image: the side plus 0.1, divided by the old side, is the scale of the grid."""
    table = torch.arange(4.0).repeat(4).view(16, 1)  # the column's number
    columns = resample_positions(table, (4, 4), (4, 6), offset=0.1).view(4, 6)[0]
    scale, expected = (6 + 0.1) / 4, []
    for i in range(6):
        x = (i + 0.5) / scale - 0.5  # of output pixel i among the inputs, cubic convolution with a = -0.75
        total = 0.0
        for j in range(math.floor(x) - 1, math.floor(x) + 3):
            d = abs(x - j)
            weight = 1.25 * d**3 - 2.25 * d**2 + 1 if d <= 1 else -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            total += weight * min(3, max(0, j))
        expected.append(total)
    torch.testing.assert_close(columns, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert (columns - resample_positions(table, (4, 4), (4, 6)).view(4, 6)[0]).abs().max() > 1e-2
    for to in ((2, 2), (3, 5), (7, 9), (37, 37)):
        assert len(resample_positions(table, (4, 4), to, offset=0.1)) == to[0] * to[1]
    network = VisionTransformer(16, 4, 16, 1, 2, positions="learned", positions_offset=0.1)
    x, own = torch.randn(1, 3, 16, 24), network.pos_embed[0, 1:]
    expected = network.patch_embed(x)[0] + resample_positions(own, (4, 4), (4, 6), offset=0.1)
    torch.testing.assert_close(network.embed(x)[0], expected)


def test_drop_path_in_training_only() -> None:
    torch.manual_seed(0)
    network = VisionTransformer(16, 4, 16, 4, 2, drop_path=0.5)
    assert [block.drop_path for block in network.blocks] == [0, 0.5 / 3, 1 / 3, 0.5]
    uniform = VisionTransformer(16, 4, 16, 4, 2, drop_path=0.5, drop_path_uniform=True)
    assert [block.drop_path for block in uniform.blocks] == [0.5] * 4
    x = torch.randn(1, 3, 16, 16).expand(32, -1, -1, -1)
    assert network(x).std(dim=0).max() > 1e-3
    assert network.eval()(x).std(dim=0).max() < 1e-5
    block = network.blocks[3].train()
    tokens = network.embed(x)
    outcomes = {tuple(round(v, 4) for v in (out - tokens[0]).flatten()[:2].tolist()) for out in block(tokens)}
    assert 2 <= len(outcomes) <= 4  # each of two branches is kept (and doubled) or not
    # The expectation over both is what evaluation computes, up to the second branch seeing the first.
    assert torch.allclose(block._drop(torch.ones(20000, 1, 1)).mean(), torch.tensor(1.0), atol=0.05)


def test_initialization_as_in_mae() -> None:
    torch.manual_seed(0)
    network = VisionTransformer(32, 8, 64, 1, 4)
    weight = network.patch_embed.proj.weight
    bound = math.sqrt(6 / (64 + 3 * 8 * 8))
    assert 0.95 * bound < weight.abs().max() <= bound
    bound = math.sqrt(6 / (64 + 192))
    assert 0.95 * bound < network.blocks[0].attn.qkv.weight.abs().max() <= bound
    assert network.blocks[0].mlp.fc1.bias.abs().max() == 0
    assert 0.01 < network.cls_token.std() < 0.03
