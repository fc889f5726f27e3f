import builtins
import subprocess
import sys

import pytest
import torch
from torch import nn

from sslbook import nn as ours
from sslbook.errors import UserError
from sslbook.nn import backbone_dim, resnet18, timm_model
from sslbook.schedules import Clock
from tests.methods.cases import gradient, make, make_batch


def test_every_name_is_there() -> None:
    for name in ours.__all__:
        assert getattr(ours, name).__name__ == name
    assert set(ours.__all__) == set(dir(ours))
    with pytest.raises(AttributeError, match="no attribute 'resnet19'"):
        ours.resnet19  # noqa: B018


def test_the_import_is_cheap() -> None:
    code = "import sys, sslbook.nn; assert not {'torchvision', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "vit_tiny_patch16_224"])
def test_any_model_of_timm(name: str) -> None:
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
def test_timms_models_are_backbones(method: str, name: str, options: dict) -> None:
    pytest.importorskip("timm", reason="needs timm")
    model = make(method, backbone=timm_model(name, **options))
    out = model(make_batch(model, 4), Clock())
    out["loss"].backward()
    for key, parameter in model.backbone.named_parameters():
        assert parameter.grad is not None, key
        assert parameter.grad.isfinite().all(), key
    assert gradient(model).norm() > 0


def test_a_wrong_name_gets_the_nearest() -> None:
    pytest.importorskip("timm", reason="needs timm")
    with pytest.raises(UserError, match="did you mean resnet18"):
        timm_model("resnet_18")


def test_without_timm_the_error_names_the_extra(monkeypatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args, **kwargs):
        if name == "timm":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r'pip install "sslbook\[timm\]"'):
        timm_model("resnet18")


def test_the_width_of_a_backbone() -> None:
    assert backbone_dim(resnet18(width=8)) == 64
    with pytest.raises(UserError, match=r"Flatten .* attribute `dim`"):
        backbone_dim(nn.Flatten())
