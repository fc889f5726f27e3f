"""Layer scale, relative positions and mask tokens of the vision transformer, and weights for another image size."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.mae import MAE
from sslbook.nn import VisionTransformer
from sslbook.nn.vit import RelativePositions, resample_positions
from sslbook.weights.backbone import export_backbone, load_backbone
from sslbook.weights.load import load_weights


def test_layer_scale_scales_the_branches() -> None:
    torch.manual_seed(0)
    network = VisionTransformer(16, 4, 16, 2, 2, layer_scale=0.1)
    block = network.blocks[1]
    assert torch.equal(block.ls1.gamma, torch.full((16,), 0.1))
    x = torch.randn(2, 5, 16)
    attended = x + 0.1 * block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), attended + 0.1 * block.mlp(block.norm2(attended)))
    with torch.no_grad():
        block.ls1.gamma.zero_()
        block.ls2.gamma.zero_()
    assert torch.equal(block(x), x)
    assert not any("ls1" in name for name, _ in VisionTransformer(16, 4, 16, 1, 2).named_parameters())


def biases(positions: RelativePositions, grid: tuple[int, int]) -> Tensor:
    """The bias of attention, one pair of tokens at a time."""
    height, width = grid
    tokens = [None, *((row, column) for row in range(height) for column in range(width))]
    out = torch.zeros(positions.table.shape[1], len(tokens), len(tokens))
    for i, a in enumerate(tokens):
        for j, b in enumerate(tokens):
            if a is None and b is None:
                row = -1
            elif a is None:  # the class token is the query
                row = -3
            elif b is None:
                row = -2
            else:
                row = (a[0] - b[0] + height - 1) * (2 * width - 1) + (a[1] - b[1] + width - 1)
            out[:, i, j] = positions.table[row]
    return out


@pytest.mark.parametrize("grid", [(2, 3), (3, 2), (1, 1)])
def test_relative_positions_against_loops(grid: tuple[int, int]) -> None:
    positions = RelativePositions(grid, 2)
    with torch.no_grad():
        positions.table.normal_()
    assert torch.equal(positions(), biases(positions, grid))


def test_relative_positions_enter_attention_alone() -> None:
    torch.manual_seed(0)
    network = VisionTransformer(8, 4, 16, 2, 2, positions="relative").eval()
    plain = VisionTransformer(8, 4, 16, 2, 2, positions="sincos").eval()
    plain.load_state_dict(network.state_dict(), strict=False)  # its positions are the other's zeros now
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(network(x), plain(x))  # the table starts at zero
    assert "pos_embed" not in dict(network.named_parameters())
    with torch.no_grad():
        network.rel_pos_bias.table.normal_()
    block, tokens = network.blocks[0], torch.randn(1, 5, 16)
    q, k, v = block.attn.qkv(tokens).view(1, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) / 8**0.5 + biases(network.rel_pos_bias, (2, 2))).softmax(dim=-1)
    expected = block.attn.proj((weights @ v).transpose(1, 2).reshape(1, 5, 16))
    torch.testing.assert_close(block.attn(tokens, network.rel_pos_bias()), expected)
    network(x)[:, 0].sum().backward()  # the sum of all would be the last layer norm's, a constant
    assert network.rel_pos_bias.table.grad.abs().sum() > 0
    with pytest.raises(UserError, match="use positions sincos or learned"):
        network(torch.randn(1, 3, 8, 16))
    with pytest.raises(UserError, match="all 4 patches and 3 came"):
        network.encode(network.embed(x)[:, :3])


@pytest.mark.parametrize("positions", ["sincos", "learned", "relative"])
def test_mask_tokens_have_positions_of_patches(positions: str) -> None:
    network = VisionTransformer(16, 4, 16, 1, 2, positions=positions)
    x, token = torch.randn(2, 3, 16, 16), torch.randn(1, 1, 16)
    mask = torch.rand(2, 16) < 0.5
    mask[:, 0] = True
    tokens = network.embed(x, mask, token)
    assert torch.equal(tokens[~mask], network.embed(x)[~mask])
    positions_of_patches = network.pos_embed[0, 1:].expand(2, -1, -1)
    torch.testing.assert_close(tokens[mask], (token + positions_of_patches)[mask])
    other = x.clone()
    other[:, :, :4, :4] = 9.0  # the first patch, masked in both
    assert torch.equal(network.embed(other, mask, token), tokens)


def test_outputs_of_all_blocks() -> None:
    network = VisionTransformer(16, 4, 16, 3, 2, layer_scale=1.0).eval()
    tokens = network.embed(torch.randn(2, 3, 16, 16))
    outputs = list(network.layers(tokens))
    assert len(outputs) == 3
    x = torch.cat([network.cls_token.expand(2, -1, -1), tokens], dim=1)
    for block, out in zip(network.blocks, outputs):
        x = block(x)
        torch.testing.assert_close(out, x)
    torch.testing.assert_close(network.encode(tokens), network.norm(outputs[-1]))


@pytest.mark.parametrize("positions", ["sincos", "learned"])
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (24, 8), (32, 20), (4, 4)])
def test_positions_for_any_input(positions: str, size: tuple[int, int]) -> None:
    network = VisionTransformer(16, 4, 16, 1, 2, positions=positions)
    x = torch.randn(2, 3, *size)
    rows, columns = size[0] // 4, size[1] // 4
    table = network.pos_embed[0, 1:].view(4, 4, 16).permute(2, 0, 1)[None]
    table = F.interpolate(table, (rows, columns), mode="bicubic") if (rows, columns) != (4, 4) else table
    expected = network.patch_embed(x) + table[0].flatten(1).T
    torch.testing.assert_close(network.embed(x), expected)
    assert network(x).shape == (2, 16)


def at(image_size: int, positions: str, **options) -> VisionTransformer:
    return VisionTransformer(image_size, 4, 16, 1, 2, positions=positions, pool="mean", **options).eval()


@pytest.mark.parametrize("positions", ["sincos", "learned", "relative"])
@pytest.mark.parametrize("to", [24, 8])
def test_weights_of_another_image_size(tmp_path: Path, positions: str, to: int) -> None:
    torch.manual_seed(0)
    small, other = at(16, positions), at(to, positions)
    if positions == "relative":
        with torch.no_grad():
            small.rel_pos_bias.table.normal_()
    export_backbone(tmp_path / "backbone.safetensors", small, {})
    loaded = load_weights(other, tmp_path / "backbone.safetensors")
    assert (loaded.missing, loaded.unused) == ([], [])
    assert loaded.resampled == ["pos_embed"] + (["rel_pos_bias.table"] if positions == "relative" else [])
    if positions != "relative":
        # The network that was trained on the other size, given images of this one, does the same.
        x = torch.randn(2, 3, to, to)
        torch.testing.assert_close(other(x), small(x))
        return
    mine, theirs = (network.rel_pos_bias.table for network in (other, small))
    assert torch.equal(mine[-3:], theirs[-3:])
    side = 2 * to // 4 - 1
    expected = resample_positions(theirs[:-3], (7, 7), (side, side))
    assert torch.equal(mine[:-3], expected)
    center = expected.view(side, side, 2)[side // 2, side // 2]  # a patch's bias for itself stays near what it was
    near = theirs[:-3].view(7, 7, 2)[3, 3]
    torch.testing.assert_close(center, near)


@pytest.mark.slow
def test_method_starts_from_weights_of_another_size(tmp_path: Path) -> None:
    source, target = MAE(at(16, "learned"), View(size=16)), MAE(at(24, "learned"), View(size=24))
    torch.save(source.state_dict(), tmp_path / "mae.pt")
    loaded = load_weights(target, tmp_path / "mae.pt")
    assert loaded.resampled == ["backbone.pos_embed"]
    assert loaded.missing == loaded.unused == ["decoder.positions"]  # fixed: made for the new grid already
    expected = resample_positions(source.backbone.pos_embed[0, 1:], (4, 4), (6, 6))
    assert torch.equal(target.backbone.pos_embed[0, 1:], expected)
    assert "resampled: backbone.pos_embed" in str(loaded)


def test_resampled_returns_none_for_other_shapes() -> None:
    network = at(16, "learned")
    assert network.resampled("pos_embed", torch.zeros(1, 8, 16)) is None  # 7 patches are no square
    assert network.resampled("pos_embed", torch.zeros(1, 10, 12)) is None  # another width
    assert network.resampled("pos_embed", torch.zeros(10, 16)) is None
    assert network.resampled("cls_token", torch.zeros(1, 10, 16)) is None
    assert RelativePositions((2, 2), 2).resampled("table", torch.zeros(8, 3)) is None
    assert RelativePositions((2, 2), 2).resampled("table", torch.zeros(2, 2)) is None


@pytest.mark.parametrize(
    "options", [{"positions": "relative", "layer_scale": 0.1}, {"positions": "learned", "drop_path_uniform": True}]
)
def test_all_options_survive_an_export(tmp_path: Path, options: dict) -> None:
    network = VisionTransformer(16, 4, 16, 2, 2, drop_path=0.1, **options)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    export_backbone(tmp_path / "backbone.safetensors", network, {})
    again, _ = load_backbone(tmp_path / "backbone.safetensors")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.eval()(x), network.eval()(x))
