from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods import spark
from sslbook.methods.spark import SparK, at, feature_maps, patchify, reconstruction_loss, sparsely, visible_mask
from sslbook.nn import ConvNet, ResNet, VisionTransformer, convert_batch_norm, resnet50, timm_model
from sslbook.schedules import Clock
from tests.methods.cases import VIEW, Case, Convolutions, make, make_batch, transformer


def convnext() -> nn.Module:
    pytest.importorskip("timm", reason="needs timm")
    return timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 4, 8, 8), patch_size=1, ls_init_value=1.0)


CASE = Case(
    options={"view": VIEW, "decoder_dim": 16},
    command={"method.decoder_dim": 16},
    learned=lambda method, batch, out: bool(out["loss"] < 0.8),  # 47/48 for who knows nothing: the images are noise
    backbone=lambda: ConvNet(4),
    overfit={"backbone": ConvNet(16), "decoder_dim": 64},
    corners=[(2, 0.02, {})],
    other_backbones=[lambda: ResNet(18, 4, "small"), convnext],
)


def test_the_loss_is_the_papers() -> None:
    prediction, target = torch.randn(3, 5, 12).double(), torch.randn(3, 5, 12).double()
    hidden = torch.rand(3, 5) < 0.6
    hidden[0, 0] = True
    errors = []
    for i in range(3):
        for j in range(5):
            if hidden[i, j]:
                values = target[i, j].tolist()
                mean = sum(values) / 12
                variance = sum((v - mean) ** 2 for v in values) / 11
                normal = [(v - mean) / (variance + 1e-6) ** 0.5 for v in values]
                errors.append(sum((p - v) ** 2 for p, v in zip(prediction[i, j].tolist(), normal)) / 12)
    assert float(reconstruction_loss(prediction, target, hidden)) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_the_methods_loss_is_of_hidden_patches() -> None:
    method = make("spark").eval()
    batch = make_batch(method, 3)
    mask = visible_mask(batch.index, (4, 4), 6, Clock())
    prediction = method.predict(batch.views[0], mask)
    expected = reconstruction_loss(patchify(prediction, 4), patchify(batch.views[0], 4), ~mask.flatten(1))
    torch.testing.assert_close(method(batch, Clock())["loss"], expected)
    assert patchify(batch.views[0], 4)[1, 6].view(4, 4, 3).permute(2, 0, 1).equal(batch.views[0][1, :, 4:8, 8:12])


def test_masks_are_keyed_and_even() -> None:
    index = torch.arange(2000)
    mask = visible_mask(index, (4, 4), 6, Clock(seed=5))
    assert mask.sum(dim=(1, 2, 3)).tolist() == [6] * 2000
    torch.testing.assert_close(mask.float().mean(dim=0)[0], torch.full((4, 4), 6 / 16), rtol=0, atol=0.04)
    assert torch.equal(visible_mask(index[3:4], (4, 4), 6, Clock(seed=5))[0], mask[3])
    assert not torch.equal(visible_mask(index, (4, 4), 6, Clock(seed=6)), mask)


def images(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches that differ where nothing is visible."""
    x = torch.randn(len(mask), 3, 16, 16)
    return x, torch.where(at(mask, x), x, 5.0)


def networks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [ConvNet(4), ResNet(18, 4, "small"), ResNet(50, 4, "small"), convnext()]


@pytest.mark.parametrize("which", range(4), ids=["convnet", "resnet18", "resnet50", "convnext"])
def test_dense_layers_leak_and_sparse_ones_do_not(which: int, monkeypatch) -> None:
    network = networks()[which]
    side = 4 if which == 0 else 2
    mask = visible_mask(torch.arange(6), (side, side), side * side // 2, Clock())
    x, other = images(mask)

    def leak() -> float:
        """How much visible places notice of what is hidden, batch norm included."""
        with sparsely(network, mask):
            pairs = list(zip(feature_maps(network, x), feature_maps(network, other)))
        changes = [((a - b) * at(mask, a)).abs().max() / (b * at(mask, b)).abs().max() for a, b in pairs]
        return float(torch.stack(changes).max().detach())

    assert leak() == 0
    sparse = spark.sparsely
    monkeypatch.setitem(globals(), "sparsely", lambda *_: nullcontext())
    assert leak() > 0.05
    assert spark.sparsely is sparse
    assert not any("forward" in module.__dict__ for module in network.modules())


@pytest.mark.parametrize("which", range(3), ids=["convnet", "resnet18", "resnet50"])
def test_the_pattern_of_the_mask_does_not_wear_off(which: int) -> None:
    network = networks()[which]
    side = 4 if which == 0 else 2
    mask = visible_mask(torch.arange(6), (side, side), side * side // 2, Clock())
    x, _ = images(mask)
    with sparsely(network, mask):
        for maps in feature_maps(network, x):
            assert (maps * ~at(mask, maps)).abs().max() == 0
    # A dense network given zeros in place of the hidden patches fills the holes.
    for maps in feature_maps(network, x * at(mask, x)):
        assert (maps * ~at(mask, maps)).abs().max() > 0


def test_the_method_encodes_sparsely() -> None:
    method = make("spark")
    mask = visible_mask(torch.arange(6), (4, 4), 6, Clock())
    x, other = images(mask)
    for maps in method.encode(x, mask):
        assert (maps * ~at(mask, maps)).abs().max() == 0
        assert (maps * at(mask, maps)).abs().max() > 0
    assert torch.equal(method.predict(x, mask), method.predict(other, mask))


def test_pooling_does_not_fill_holes() -> None:
    network, mask = ResNet(18, 4), visible_mask(torch.arange(6), (2, 2), 2, Clock())
    with sparsely(network, mask):
        for maps in feature_maps(network, torch.randn(6, 3, 64, 64)):
            assert (maps * ~at(mask, maps)).abs().max() == 0


def test_the_decoder_draws_from_maps_of_all_scales() -> None:
    method = make("spark")
    batch, mask = make_batch(method, 3), visible_mask(torch.arange(3), (4, 4), 6, Clock())
    maps = [m.detach().requires_grad_() for m in method.encode(batch.views[0], mask)]
    assert [tuple(m.shape[2:]) for m in maps] == [(4, 4), (8, 8)]
    method.encode = lambda *_: maps
    x = method.decoder[0](method.densify[0](maps[0], mask))
    literal = method.predict_pixels(method.decoder[1](x + method.densify[1](maps[1], mask)))
    drawn, weight = method.predict(batch.views[0], mask), torch.randn(literal.shape)
    torch.testing.assert_close(drawn, literal)
    expected = torch.autograd.grad((literal * weight).sum(), maps)
    torch.testing.assert_close(torch.autograd.grad((drawn * weight).sum(), maps), expected)


def test_a_sparse_convolution_place_by_place() -> None:
    network = nn.Conv2d(2, 3, 3, padding=1)
    mask = torch.rand(2, 1, 4, 4) < 0.5
    x = torch.randn(2, 2, 4, 4)
    with sparsely(network, mask):
        y = network(x)
    for i in range(2):
        for row in range(4):
            for column in range(4):
                expected = network.bias.clone()
                for a in range(3):
                    for b in range(3):
                        r, c = row + a - 1, column + b - 1
                        if 0 <= r < 4 and 0 <= c < 4 and mask[i, 0, r, c]:
                            expected = expected + network.weight[:, :, a, b] @ x[i, :, r, c]
                expected = expected if mask[i, 0, row, column] else torch.zeros(3)
                torch.testing.assert_close(y[i, :, row, column], expected)


@pytest.mark.parametrize("converted", [False, True])
def test_batch_norm_is_over_visible_places(converted: bool) -> None:
    network = nn.Sequential(nn.BatchNorm2d(3))
    if converted:
        network = nn.Sequential(convert_batch_norm(network[0]))
    mask = visible_mask(torch.arange(5), (2, 2), 1, Clock())
    x = 3 + 2 * torch.randn(5, 3, 4, 4)
    with sparsely(network, mask):
        y = network(x)
    visible = at(mask, x)[:, 0]
    rows = x.permute(0, 2, 3, 1)[visible].double()
    mean, variance = rows.mean(dim=0), rows.var(dim=0, correction=0)
    expected = ((rows - mean) / (variance + 1e-5).sqrt()).float()
    torch.testing.assert_close(y.permute(0, 2, 3, 1)[visible], expected)
    assert (y * ~at(mask, y)).abs().max() == 0
    torch.testing.assert_close(network[0].running_mean, (0.1 * mean).float())
    torch.testing.assert_close(network[0].running_var, (0.9 + 0.1 * rows.var(dim=0)).float())


def test_afterwards_the_backbone_is_as_it_was() -> None:
    network, mask = ResNet(18, 4, "small").eval(), visible_mask(torch.arange(2), (2, 2), 2, Clock())
    x = torch.randn(2, 3, 16, 16)
    before = network(x)

    def fail() -> None:
        with sparsely(network, mask):
            assert not torch.equal(network(x), before)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert torch.equal(network(x), before)


def test_with_everything_visible_it_is_dense() -> None:
    network, mask = ResNet(18, 4, "small"), torch.ones(3, 1, 2, 2, dtype=torch.bool)
    x = torch.randn(3, 3, 16, 16)
    dense = feature_maps(network, x)
    with sparsely(network, mask):
        for a, b in zip(feature_maps(network, x), dense):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_decoder_fills_holes_with_the_mask_token() -> None:
    method = make("spark")
    batch = make_batch(method, 2)
    mask = visible_mask(batch.index, (4, 4), 6, Clock())
    for densify, maps in zip(method.densify, method.encode(batch.views[0], mask)):
        seen = []
        densify.project.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        densify(maps, mask)
        holes = ~at(mask, seen[0]).expand_as(seen[0])
        assert torch.equal(seen[0][holes], densify.mask_token[:, None, None].expand_as(seen[0])[holes])
        rows = maps.permute(0, 2, 3, 1)[at(mask, maps)[:, 0]].double()  # normalized over visible places
        expected = (rows - rows.mean(dim=0)) / (rows.var(dim=0, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(seen[0].permute(0, 2, 3, 1)[at(mask, maps)[:, 0]], expected.float())


def test_paper_scale() -> None:
    with torch.device("meta"):
        method = SparK(resnet50())
        maps = feature_maps(method.backbone, torch.zeros(2, 3, 224, 224))
    assert [tuple(m.shape[1:]) for m in maps] == [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    assert (method.stride, method.num_visible(49)) == (32, 20)
    assert [tuple(d.project.weight.shape[:2]) for d in method.densify] == [
        (768, 2048),
        (384, 1024),
        (192, 512),
        (96, 256),
    ]
    assert [block.up.in_channels for block in method.decoder] == [768, 384, 192, 96, 48]


def test_what_cannot_be_is_refused() -> None:
    for backbone in (transformer(), Convolutions(), VisionTransformer(16, 4, 16, 1, 2)):
        with pytest.raises(UserError, match=r"cannot use a \w+: choose sslbook.nn.ResNet"):
            make("spark", backbone=backbone)
    with pytest.raises(UserError, match=r"sides 5, 9: use a view of 16 pixels"):
        make("spark", view=View(size=18))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("spark", mask_ratio=0.0)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("spark", mask_ratio=1.0)
    with pytest.raises(UserError, match="use a multiple of 4"):
        make("spark", decoder_dim=18)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4)])
def test_a_network_that_notices_holes_is_refused(norm: nn.Module) -> None:
    network = ResNet(18, 4, "small")
    SparK(network, VIEW, decoder_dim=16)
    network.bn1 = norm
    with pytest.raises(UserError, match="cannot use this ResNet: one of its layers"):
        SparK(network, VIEW, decoder_dim=16)
