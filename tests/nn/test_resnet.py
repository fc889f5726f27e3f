from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from sslbook.errors import UserError
from sslbook.methods.simclr import SimCLR
from sslbook.nn import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
    wide_resnet50_2,
    wide_resnet101_2,
)
from sslbook.weights.backbone import export_backbone, load_backbone
from sslbook.weights.load import load_weights


@pytest.mark.parametrize(
    ("factory", "name", "parameters"),
    # Torchvision's published counts with a classifier of 1000 classes, and without it.
    [
        (resnet18, "resnet18", 11_689_512 - 513_000),
        (resnet34, "resnet34", 21_797_672 - 513_000),
        (resnet50, "resnet50", 25_557_032 - 2_049_000),
        (resnet101, "resnet101", 44_549_160 - 2_049_000),
        (resnet152, "resnet152", 60_192_808 - 2_049_000),
        (wide_resnet50_2, "wide_resnet50_2", 68_883_240 - 2_049_000),
        (wide_resnet101_2, "wide_resnet101_2", 126_886_696 - 2_049_000),
    ],
)
def test_names_and_counts_are_torchvisions(factory, name: str, parameters: int) -> None:
    with torch.device("meta"):
        ours, theirs = factory(), getattr(torchvision.models, name)()
    assert sum(p.numel() for p in ours.parameters()) == parameters
    expected = {key: value.shape for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    assert {key: value.shape for key, value in ours.state_dict().items()} == expected
    assert ours.dim == theirs.fc.in_features


@pytest.mark.parametrize(("factory", "name"), [(resnet18, "resnet18"), (wide_resnet50_2, "wide_resnet50_2")])
@pytest.mark.slow
def test_torchvision_weights_give_torchvision_features(factory, name: str) -> None:
    theirs = getattr(torchvision.models, name)(num_classes=2).eval()
    ours = factory().eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 48)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.slow
def test_method_starts_from_torchvision_weights(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    method = SimCLR(resnet18(), projector_dim=8)
    loaded = load_weights(method, tmp_path / "resnet18.pth")
    assert loaded.unused == ["fc.weight", "fc.bias"]
    assert all(name.startswith("projector.") for name in loaded.missing)
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(method.backbone.eval()(x), theirs.eval()(x))
    assert str(loaded).startswith("120 of ")
    assert str(loaded).endswith("not used: fc.weight, fc.bias")
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "resnet50.pth")
    with pytest.raises(UserError, match="holds only 77 of the 100 tensors of the backbone"):
        load_weights(method, tmp_path / "resnet50.pth")


def test_wide_network_export_round_trip(tmp_path: Path) -> None:
    wide = ResNet(50, 4, "small", inner_width=2)
    export_backbone(tmp_path / "backbone.safetensors", wide, {})
    again, _ = load_backbone(tmp_path / "backbone.safetensors")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(again.eval()(x), wide.eval()(x))
    assert wide.layer1[0].conv2.weight.shape == (8, 8, 3, 3)


def test_small_stem_keeps_the_resolution() -> None:
    small = ResNet(18, width=4, stem="small")
    x = torch.randn(2, 3, 32, 32)
    assert small.forward_map(x).shape == (2, 32, 4, 4)
    assert ResNet(18, width=4).forward_map(x).shape == (2, 32, 1, 1)
    assert small(x).shape == (2, small.dim) == (2, 32)
    assert ResNet(50, width=4, stem="small").dim == 128
    torch.testing.assert_close(small.eval()(x), small.forward_map(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("depth", [18, 50])
def test_zero_init_residual_makes_blocks_the_identity(depth: int) -> None:
    network = ResNet(depth, width=4, stem="small", zero_init_residual=True).eval()
    block = network.layer1[1]
    x = torch.rand(1, network.layer1[1].conv1.in_channels, 8, 8)
    torch.testing.assert_close(block(x), x)
    assert not torch.equal(ResNet(depth, width=4, stem="small").eval().layer1[1](x), x)


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match="use one of 18, 34, 50, 101, 152"):
        ResNet(51)
