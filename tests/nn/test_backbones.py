import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from sslbook import nn as ours
from sslbook.errors import UserError
from sslbook.nn import ConvNet, DiscreteEncoder, ResNet, Sobel, VisionTransformer, backbone_dim, resnet18, timm_model
from sslbook.nn.backbones import Backbone, MapBackbone, StagesBackbone, TokenBackbone, require
from sslbook.schedules import Clock
from tests.methods.cases import gradient, make, make_batch


def test_exports_every_name() -> None:
    for name in ours.__all__:
        assert getattr(ours, name).__name__ == name
    assert set(ours.__all__) == set(dir(ours))
    with pytest.raises(AttributeError, match="no attribute 'resnet19'"):
        ours.resnet19  # noqa: B018


def test_import_loads_no_heavy_library() -> None:
    code = "import sys, sslbook.nn; assert not {'torchvision', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_any_timm_model(name: str) -> None:
    pytest.importorskip("timm", reason="needs timm")
    model = timm_model(name).eval()
    assert model(torch.randn(1, 3, 224, 224)).shape == (1, model.dim)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
        ),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (4, 4, 8, 8), "patch_size": 1}),
    ],
    ids=["swin", "convnext"],
)
@pytest.mark.parametrize("method", ["simclr", "byol"])
def test_timm_models_train_with_every_parameter(method: str, name: str, options: dict) -> None:
    pytest.importorskip("timm", reason="needs timm")
    model = make(method, backbone=timm_model(name, **options))
    out = model(make_batch(model, 4), Clock())
    out["loss"].backward()
    for key, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert gradient(model).norm() > 0


def test_misspelled_timm_name_suggests_nearest() -> None:
    pytest.importorskip("timm", reason="needs timm")
    with pytest.raises(UserError, match="did you mean resnet18"):
        timm_model("resnet_18")


def test_missing_timm_names_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it fails
    with pytest.raises(UserError, match=r'pip install "sslbook\[timm\]"'):
        timm_model("resnet18")


def test_backbone_dim() -> None:
    assert backbone_dim(resnet18(width=8)) == 64
    with pytest.raises(UserError, match=r"Flatten .* attribute `dim`"):
        backbone_dim(nn.Flatten())


SWIN = {
    "img_size": 16,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (1, 1),
    "num_heads": (2, 2),
    "window_size": 4,
    "drop_path_rate": 0.0,
}
MAKE = {
    "resnet": lambda: ResNet(18, width=4),
    "convnet": lambda: ConvNet(4),
    "sobel": lambda: Sobel(ConvNet(4)),
    "discrete encoder": lambda: DiscreteEncoder(4, 8, dim=8, depth=1),
    "vit": lambda: VisionTransformer(32, 8, 16, 1, 2, pool="mean"),
    "timm resnet": lambda: timm_model("resnet10t"),
    "timm convnext": lambda: timm_model("convnext_atto", depths=(1, 1, 1, 1), dims=(4, 4, 8, 8)),
    "timm vit": lambda: timm_model("vit_tiny_patch16_224", img_size=32, depth=1),
    "timm swin": lambda: timm_model("swin_tiny_patch4_window7_224", **{**SWIN, "img_size": 32}),
}
HAS = {
    "resnet": StagesBackbone,
    "convnet": StagesBackbone,
    "sobel": MapBackbone,
    "discrete encoder": MapBackbone,
    "vit": TokenBackbone,
    "timm resnet": StagesBackbone,
    "timm convnext": StagesBackbone,
    "timm vit": TokenBackbone,
    "timm swin": TokenBackbone,
}


@pytest.mark.parametrize("name", MAKE)
def test_backbones_have_what_their_protocol_promises(name: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    backbone, x = MAKE[name]().eval(), torch.randn(2, 3, 32, 32)
    assert isinstance(backbone, Backbone)
    assert isinstance(backbone, HAS[name])
    feature, features = backbone(x), backbone.forward_map(x)
    assert feature.shape == (2, backbone.dim)
    assert features.shape[:2] == feature.shape
    if name not in ("timm convnext", "timm vit"):  # their features are not the mean of the map
        torch.testing.assert_close(features.mean(dim=(2, 3)), feature, rtol=1e-4, atol=1e-5)
    if HAS[name] is StagesBackbone:
        stages = backbone.forward_stages(x)
        assert torch.equal(stages[-1], features)
        sides = [stage.shape[2] for stage in stages]
        assert sides == sorted(sides, reverse=True)
    if HAS[name] is TokenBackbone:
        tokens = backbone.forward_tokens(x)[:, backbone.num_prefix_tokens :]
        torch.testing.assert_close(tokens, features.flatten(2).mT)
        assert features.shape[2:] == (32 // backbone.stride, 32 // backbone.stride)


@pytest.mark.parametrize("name", ["vit", "timm vit", "timm swin"])
def test_mask_token_replaces_masked_patches(name: str) -> None:
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="needs timm")
    torch.manual_seed(0)
    backbone, x = MAKE[name]().eval(), torch.randn(1, 3, 32, 32)
    side = 32 // backbone.patch_size
    mask = torch.zeros(1, side, side, dtype=torch.bool)
    mask[:, : side // 2, side // 2 :] = True  # the upper right quarter
    token = torch.randn(1, 1, backbone.token_dim)
    out = backbone.forward_tokens(x, mask.flatten(1), token)
    changed = x.clone()
    changed[:, :, :16, 16:] = 9.0
    assert torch.equal(backbone.forward_tokens(changed, mask.flatten(1), token), out)  # masked pixels are not seen
    assert not torch.equal(backbone.forward_tokens(x, mask.flatten(1), token + 1), out)
    changed[:, :, 17, 17] += 1  # a pixel of a visible patch
    assert not torch.equal(backbone.forward_tokens(changed, mask.flatten(1), token), out)
    nothing = torch.zeros_like(mask).flatten(1)
    assert torch.equal(backbone.forward_tokens(x, nothing, token), backbone.forward_tokens(x))


def test_timm_backbone_keeps_names_and_can_be_copied() -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    model = MAKE["timm swin"]()
    assert list(model.state_dict()) == list(
        timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **SWIN).state_dict()
    )
    assert type(model).__name__ == "SwinTransformer"
    other, x = copy.deepcopy(model).eval(), torch.randn(1, 3, 32, 32)
    assert torch.equal(other.forward_map(x), model.eval().forward_map(x))


@pytest.mark.parametrize(
    ("need", "match"),
    [
        ("forward_map", "ResNet, ConvNet or VisionTransformer"),
        ("forward_stages", "a ResNet or ConvNeXt of timm"),
        ("forward_tokens", "VisionTransformer, vit_base .* timm/swin"),
    ],
)
def test_missing_capability_names_networks_that_have_it(need: str, match: str) -> None:
    require({"forward_map": ConvNet(4), "forward_stages": ConvNet(4)}.get(need) or MAKE["vit"](), need, "Anything")
    with pytest.raises(UserError, match=f"Anything needs .* cannot use a Linear: choose .*{match}"):
        require(nn.Linear(1, 1), need, "Anything")
