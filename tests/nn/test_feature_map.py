import pytest
import torch
from torch import nn

from sslbook.errors import UserError
from sslbook.nn import ConvNet, ResNet
from sslbook.nn.feature_map import UpConvolutions, map_side


def test_each_transposed_convolution_doubles() -> None:
    x = torch.randn(2, 8, 3, 5)
    assert UpConvolutions(8, [6, 4], 3)(x).shape == (2, 3, 12, 20)
    assert [type(m) for m in UpConvolutions(8, [], 3)] == [nn.Conv2d]


def test_map_side_leaves_the_backbone_unchanged() -> None:
    backbone = ConvNet(4)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    for size in (16, 24, 33):
        assert map_side(backbone, size, "this") == backbone.eval().forward_map(torch.zeros(1, 3, size, size)).shape[2]
    assert map_side(ResNet(18, width=4), 224, "this") == 7
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


def test_rejects_backbone_without_a_feature_map() -> None:
    with pytest.raises(UserError, match=r"this needs a feature map and cannot use a Linear: choose sslbook.nn.ResNet"):
        map_side(nn.Linear(1, 1), 16, "this")
