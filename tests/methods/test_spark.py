from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from sslbook.data.masks import uniform_mask
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods import spark
from sslbook.methods.spark import SparK, mask_like, reconstruction_loss, sparse_layers
from sslbook.nn import ConvNet, ResNet, VisionTransformer, convert_batch_norm, resnet50, timm_model
from sslbook.nn.patches import patchify
from sslbook.schedules import Clock
from tests.methods.cases import VIEW, Case, Convolutions, make, make_batch, transformer


def convnext() -> nn.Module:
    pytest.importorskip("timm", reason="needs timm")
    return timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 4, 8, 8), patch_size=1, ls_init_value=1.0)


CASE = Case(
    options={"view": VIEW, "decoder_dim": 16},
    command={"method.decoder_dim": 16},
    learned=lambda method, batch, out: bool(out["loss"] < 0.8),  # 47/48 for a constant prediction: the images are noise
    backbone=lambda: ConvNet(4),
    overfit={"backbone": ConvNet(16), "decoder_dim": 64},
    corners=[(2, 0.02, {})],
    other_backbones=[lambda: ResNet(18, 4, "small"), convnext],
)


def test_loss_matches_literal_formula() -> None:
    prediction, target = torch.randn(3, 5, 12).double(), torch.randn(3, 5, 12).double()
    masked = torch.rand(3, 5) < 0.6
    masked[0, 0] = True
    errors = []
    for i in range(3):
        for j in range(5):
            if masked[i, j]:
                values = target[i, j].tolist()
                mean = sum(values) / 12
                variance = sum((v - mean) ** 2 for v in values) / 11
                normal = [(v - mean) / (variance + 1e-6) ** 0.5 for v in values]
                errors.append(sum((p - v) ** 2 for p, v in zip(prediction[i, j].tolist(), normal)) / 12)
    assert float(reconstruction_loss(prediction, target, masked)) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_loss_is_over_masked_patches() -> None:
    method = make("spark").eval()
    batch = make_batch(method, 3)
    mask = visible_mask(batch.index, 4, 6)
    prediction = method.predict(batch.views[0], mask)
    expected = reconstruction_loss(patchify(prediction, 4), patchify(batch.views[0], 4), ~mask.flatten(1))
    torch.testing.assert_close(method(batch, Clock())["loss"], expected)
    assert patchify(batch.views[0], 4)[1, 6].view(4, 4, 3).permute(2, 0, 1).equal(batch.views[0][1, :, 4:8, 8:12])


def visible_mask(index: Tensor, side: int, count: int) -> Tensor:
    return uniform_mask(index, side * side, count, Clock()).view(len(index), 1, side, side)


def images(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches that differ where nothing is visible."""
    x = torch.randn(len(mask), 3, 16, 16)
    return x, torch.where(mask_like(mask, x), x, 5.0)


def networks() -> list[nn.Module]:
    torch.manual_seed(0)
    return [ConvNet(4), ResNet(18, 4, "small"), ResNet(50, 4, "small"), convnext()]


@pytest.mark.parametrize("which", range(4), ids=["convnet", "resnet18", "resnet50", "convnext"])
def test_dense_layers_leak_and_sparse_layers_do_not(which: int, monkeypatch) -> None:
    network = networks()[which]
    side = 4 if which == 0 else 2
    mask = visible_mask(torch.arange(6), side, side * side // 2)
    x, other = images(mask)

    def leak() -> float:
        """Relative change at visible positions when masked pixels change, batch norm included."""
        with sparse_layers(network, mask):
            pairs = list(zip(network.forward_stages(x), network.forward_stages(other)))
        changes = [((a - b) * mask_like(mask, a)).abs().max() / (b * mask_like(mask, b)).abs().max() for a, b in pairs]
        return float(torch.stack(changes).max().detach())

    assert leak() == 0
    sparse = spark.sparse_layers
    monkeypatch.setitem(globals(), "sparse_layers", lambda *_: nullcontext())
    assert leak() > 0.05
    assert spark.sparse_layers is sparse
    assert not any("forward" in module.__dict__ for module in network.modules())


@pytest.mark.parametrize("which", range(3), ids=["convnet", "resnet18", "resnet50"])
def test_masked_positions_stay_empty(which: int) -> None:
    network = networks()[which]
    side = 4 if which == 0 else 2
    mask = visible_mask(torch.arange(6), side, side * side // 2)
    x, _ = images(mask)
    with sparse_layers(network, mask):
        for maps in network.forward_stages(x):
            assert (maps * ~mask_like(mask, maps)).abs().max() == 0
    # A dense network given zeros in place of the masked patches does not keep them empty.
    for maps in network.forward_stages(x * mask_like(mask, x)):
        assert (maps * ~mask_like(mask, maps)).abs().max() > 0


def test_encoder_is_sparse() -> None:
    method = make("spark")
    mask = visible_mask(torch.arange(6), 4, 6)
    x, other = images(mask)
    for maps in method.encode(x, mask):
        assert (maps * ~mask_like(mask, maps)).abs().max() == 0
        assert (maps * mask_like(mask, maps)).abs().max() > 0
    assert torch.equal(method.predict(x, mask), method.predict(other, mask))


def test_pooling_keeps_masked_positions_empty() -> None:
    network, mask = ResNet(18, 4), visible_mask(torch.arange(6), 2, 2)
    with sparse_layers(network, mask):
        for maps in network.forward_stages(torch.randn(6, 3, 64, 64)):
            assert (maps * ~mask_like(mask, maps)).abs().max() == 0


def test_decoder_uses_maps_of_all_resolutions() -> None:
    method = make("spark")
    batch, mask = make_batch(method, 3), visible_mask(torch.arange(3), 4, 6)
    maps = [m.detach().requires_grad_() for m in method.encode(batch.views[0], mask)]
    assert [tuple(m.shape[2:]) for m in maps] == [(4, 4), (8, 8)]
    method.encode = lambda *_: maps
    x = method.decoder[0](method.densify[0](maps[0], mask))
    literal = method.predict_pixels(method.decoder[1](x + method.densify[1](maps[1], mask)))
    prediction, weight = method.predict(batch.views[0], mask), torch.randn(literal.shape)
    torch.testing.assert_close(prediction, literal)
    expected = torch.autograd.grad((literal * weight).sum(), maps)
    torch.testing.assert_close(torch.autograd.grad((prediction * weight).sum(), maps), expected)


def test_sparse_convolution_position_by_position() -> None:
    network = nn.Conv2d(2, 3, 3, padding=1)
    mask = torch.rand(2, 1, 4, 4) < 0.5
    x = torch.randn(2, 2, 4, 4)
    with sparse_layers(network, mask):
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
def test_batch_norm_is_over_visible_positions(converted: bool) -> None:
    network = nn.Sequential(nn.BatchNorm2d(3))
    if converted:
        network = nn.Sequential(convert_batch_norm(network[0]))
    mask = visible_mask(torch.arange(5), 2, 1)
    x = 3 + 2 * torch.randn(5, 3, 4, 4)
    with sparse_layers(network, mask):
        y = network(x)
    visible = mask_like(mask, x)[:, 0]
    rows = x.permute(0, 2, 3, 1)[visible].double()
    mean, variance = rows.mean(dim=0), rows.var(dim=0, correction=0)
    expected = ((rows - mean) / (variance + 1e-5).sqrt()).float()
    torch.testing.assert_close(y.permute(0, 2, 3, 1)[visible], expected)
    assert (y * ~mask_like(mask, y)).abs().max() == 0
    torch.testing.assert_close(network[0].running_mean, (0.1 * mean).float())
    torch.testing.assert_close(network[0].running_var, (0.9 + 0.1 * rows.var(dim=0)).float())


def test_sparse_layers_restore_the_backbone() -> None:
    network, mask = ResNet(18, 4, "small").eval(), visible_mask(torch.arange(2), 2, 2)
    x = torch.randn(2, 3, 16, 16)
    before = network(x)

    def fail() -> None:
        with sparse_layers(network, mask):
            assert not torch.equal(network(x), before)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert torch.equal(network(x), before)


def test_with_everything_visible_it_is_dense() -> None:
    network, mask = ResNet(18, 4, "small"), torch.ones(3, 1, 2, 2, dtype=torch.bool)
    x = torch.randn(3, 3, 16, 16)
    dense = network.forward_stages(x)
    with sparse_layers(network, mask):
        for a, b in zip(network.forward_stages(x), dense):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_mask_tokens_fill_masked_positions() -> None:
    method = make("spark")
    batch = make_batch(method, 2)
    mask = visible_mask(batch.index, 4, 6)
    for densify, maps in zip(method.densify, method.encode(batch.views[0], mask)):
        inputs_seen = []
        densify.project.register_forward_pre_hook(lambda _, inputs, store=inputs_seen: store.append(inputs[0]))
        densify(maps, mask)
        (dense,) = inputs_seen
        masked = ~mask_like(mask, dense).expand_as(dense)
        assert torch.equal(dense[masked], densify.mask_token[:, None, None].expand_as(dense)[masked])
        rows = maps.permute(0, 2, 3, 1)[mask_like(mask, maps)[:, 0]].double()  # normalized over visible positions
        expected = (rows - rows.mean(dim=0)) / (rows.var(dim=0, correction=0) + 1e-5).sqrt()
        torch.testing.assert_close(dense.permute(0, 2, 3, 1)[mask_like(mask, maps)[:, 0]], expected.float())


def test_paper_scale() -> None:
    with torch.device("meta"):
        method = SparK(resnet50())
        maps = method.backbone.forward_stages(torch.zeros(2, 3, 224, 224))
    assert [tuple(m.shape[1:]) for m in maps] == [(256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)]
    assert (method.stride, method.num_visible) == (32, 20)
    assert [tuple(d.project.weight.shape[:2]) for d in method.densify] == [
        (768, 2048),
        (384, 1024),
        (192, 512),
        (96, 256),
    ]
    assert [block.up.in_channels for block in method.decoder] == [768, 384, 192, 96, 48]


def test_rejects_invalid_options() -> None:
    for backbone in (transformer(), Convolutions(), VisionTransformer(16, 4, 16, 1, 2)):
        with pytest.raises(UserError, match=r"SparK needs .* cannot use a \w+: choose sslbook.nn.ResNet"):
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
def test_rejects_norms_over_all_positions(norm: nn.Module) -> None:
    network = ResNet(18, 4, "small")
    SparK(network, VIEW, decoder_dim=16)
    network.bn1 = norm
    with pytest.raises(UserError, match=f"cannot use this ResNet: its layer {type(norm).__name__} depends on all"):
        SparK(network, VIEW, decoder_dim=16)


@pytest.mark.parametrize(
    ("name", "options", "layer"),
    [
        ("convnextv2_atto", {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8)}, "GlobalResponseNorm"),
        ("seresnet18", {}, "SEModule"),
        ("vit_tiny_patch16_224", {"depth": 1}, "Attention"),
    ],
)
def test_rejects_timm_layers_over_all_positions(name: str, options: dict, layer: str) -> None:
    pytest.importorskip("timm", reason="needs timm")
    with pytest.raises(UserError, match=f"its layer {layer} depends on all positions"):
        make("spark", backbone=timm_model(name, **options))
