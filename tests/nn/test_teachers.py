from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.nn import ConvNet, ResNet, VisionTransformer, timm_model
from sslbook.nn.teachers import Teacher
from sslbook.nn.vit import Attention
from sslbook.weights.backbone import export_backbone
from sslbook.weights.teachers import open_teacher

VIEW = View(size=16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def test_teacher_is_frozen_and_stays_in_evaluation_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.Dropout(0.5))
    teacher = nn.ModuleList([Teacher(model.train(), VIEW)]).train()[0]
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    x = torch.randn(4, 3, 16, 16, requires_grad=True)
    first, again = teacher(x), teacher(x)
    assert torch.equal(first.patches, again.patches)
    assert not first.patches.requires_grad
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("positions", ["sincos", "relative"])
def test_patches_and_attention_of_transformer_against_loops(depth: int, positions: str) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(16, 4, 16, depth, 2, positions=positions)
    if positions == "relative":
        nn.init.normal_(model.rel_pos_bias.table)
    teacher = Teacher(model, VIEW)
    x = torch.randn(2, 3, 16, 16)
    features = teacher(x)
    tokens = model.encode(model.embed(x))
    torch.testing.assert_close(features.patches, tokens[:, 1:])
    torch.testing.assert_close(features.cls, tokens[:, 0])
    assert (teacher.grid, teacher.dim, teacher.has_cls, features.grid) == ((4, 4), 16, True, (4, 4))
    # The attention by loops: the input of the last block is what comes out of the one before.
    before = torch.cat([model.cls_token.expand(2, -1, -1), model.embed(x)], dim=1)
    for block in model.blocks[:-1]:
        before = block(before, model.rel_pos_bias() if model.rel_pos_bias is not None else None)
    block = model.blocks[-1]
    qkv = block.attn.qkv(block.norm1(before)).double()
    for i in range(2):
        expected = torch.zeros(17, dtype=torch.float64)
        for head in range(2):
            q = qkv[i, 0, 8 * head : 8 * head + 8]
            scores = [float(q @ qkv[i, j, 16 + 8 * head : 24 + 8 * head]) / 8**0.5 for j in range(17)]
            if model.rel_pos_bias is not None:
                scores = [score + float(model.rel_pos_bias()[head, 0, j]) for j, score in enumerate(scores)]
            expected += torch.tensor(scores, dtype=torch.float64).softmax(dim=0) / 2
        expected = expected[1:] / expected[1:].sum()
        torch.testing.assert_close(features.attention[i], expected.float(), rtol=1e-4, atol=1e-6)


def test_attention_without_class_token_is_contribution_to_mean() -> None:
    model = ConvNet(4).eval()
    features = Teacher(model, VIEW)(x := torch.rand(3, 3, 16, 16))
    maps = model.forward_map(x)
    assert features.cls is None
    torch.testing.assert_close(features.patches, maps.flatten(2).mT)
    mean = maps.mean(dim=(2, 3))
    for i in range(3):
        share = [float(maps[i, :, j // 4, j % 4] @ mean[i]) / (16 * float(mean[i] @ mean[i])) for j in range(16)]
        torch.testing.assert_close(features.attention[i], torch.tensor(share), rtol=1e-4, atol=1e-6)


def test_attention_is_uniform_where_features_are_zero() -> None:
    features = Teacher(nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Threshold(1e9, 0.0)), VIEW)(torch.randn(2, 3, 16, 16))
    assert torch.equal(features.attention, torch.full((2, 16), 1 / 16))


def test_images_are_renormalized_for_teacher(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ResNet(18, 4, "small")
    facts = {"view": {"size": 32, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}}
    export_backbone(tmp_path / "backbone.safetensors", model, facts)
    raw = torch.rand(2, 3, 16, 16)
    ours, theirs = (
        (raw - torch.tensor(m)[:, None, None]) / torch.tensor(s)[:, None, None]
        for m, s in [(VIEW.mean, VIEW.std), (facts["view"]["mean"], facts["view"]["std"])]
    )
    expected = model.eval().forward_map(theirs).flatten(2).mT
    for name in (tmp_path, tmp_path / "backbone.safetensors"):
        torch.testing.assert_close(open_teacher(str(name), VIEW)(ours).patches, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(Teacher(model, VIEW)(ours).patches, expected, rtol=1e-2)  # a module: as the student's
    assert open_teacher(str(tmp_path), VIEW, size=32)(ours).patches.shape == (2, 16, 32)


def test_images_are_resized_for_teacher() -> None:
    model = VisionTransformer(24, 6, 16, 1, 2)
    with pytest.raises(UserError, match="nearest size that works is 18x18"):
        Teacher(model, VIEW)
    teacher = Teacher(model, VIEW, size=24)
    x = torch.randn(1, 3, 16, 16)
    big = F.interpolate(x, (24, 24), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher(x).patches, Teacher(model, View(size=24))(big).patches)
    teacher.require_grid((4, 4))


def test_rejects_other_grid_naming_the_size() -> None:
    teacher = Teacher(ResNet(18, 4, "small"), VIEW)
    with pytest.raises(UserError, match=r"a grid of 2x2 patches and the student one of 4x4: .*teacher_size 32"):
        teacher.require_grid((4, 4))
    Teacher(ResNet(18, 4, "small"), VIEW, size=32).require_grid((4, 4))


def tiny(name: str, **options) -> nn.Module:
    pytest.importorskip("timm", reason="needs timm")
    return timm_model(name, **options)


def test_open_timm_teacher_by_name(monkeypatch) -> None:
    timm = pytest.importorskip("timm", reason="needs timm")
    options = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **options)
    model.pretrained_cfg = {"mean": (0.1, 0.1, 0.1), "std": (0.5, 0.5, 0.5)}
    asked = {}
    monkeypatch.setattr(timm, "create_model", lambda name, **options: asked.update(name=name, **options) or model)
    teacher = open_teacher("timm/vit_tiny_patch16_224", VIEW)
    assert asked == {"name": "vit_tiny_patch16_224", "num_classes": 0, "pretrained": True, "in_chans": 3}
    assert teacher.grid == (2, 2)
    raw = torch.rand(2, 3, 16, 16)
    theirs = (raw - 0.1) / 0.5
    ours = (raw - torch.tensor(VIEW.mean)[:, None, None]) / torch.tensor(VIEW.std)[:, None, None]
    features, tokens = teacher(ours), model.forward_features(theirs)
    torch.testing.assert_close(features.patches, tokens[:, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features.cls, tokens[:, 0], rtol=1e-4, atol=1e-5)
    twin = VisionTransformer(16, 8, 16, 2, 2, positions="learned")
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(features.attention, Teacher(twin, VIEW)(theirs).attention, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="did you mean resnet18"):
        open_teacher("timm/resnet_18", VIEW)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224"])
def test_timm_attention_is_the_one_that_makes_the_output(name: str) -> None:
    """Also with relative and with rotary positions; with one head, its output is the values weighted by it."""
    model = tiny(name, img_size=16, patch_size=4, depth=2, embed_dim=16, num_heads=1).eval()
    for table in (p for key, p in model.named_parameters() if "position_bias" in key or "q_bias" in key):
        nn.init.normal_(table)  # those of BEiT begin at zero
    attention, kept = model.blocks[-1].attn, {}
    fused = attention.fused_attn
    attention.register_forward_hook(lambda _, inputs, out: kept.update(x=inputs[0], out=out))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_tokens(x), model.forward_attention(x)[0])
        _, weights = model.forward_attention(x)
    bias = attention.qkv.bias[32:] if getattr(attention, "v_bias", None) is None else attention.v_bias
    v = F.linear(kept["x"], attention.qkv.weight[32:], bias)
    mixed = getattr(attention, "norm", nn.Identity())((weights[:, :, None] * v).sum(dim=1))
    torch.testing.assert_close(attention.proj(mixed), kept["out"][:, 0], rtol=1e-4, atol=1e-5)
    expected = weights[:, 1:] / weights[:, 1:].sum(dim=1, keepdim=True)
    torch.testing.assert_close(Teacher(model, VIEW)(x).attention, expected, rtol=1e-4, atol=1e-5)
    assert attention.fused_attn is fused  # left as it was


@pytest.mark.parametrize(
    ("name", "options", "grid"),
    [
        ("resnet18", {"block_args": {}}, (1, 1)),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
            (4, 4),
        ),
    ],
    ids=["resnet", "swin"],
)
def test_timm_teachers_without_class_token(name: str, options: dict, grid: tuple[int, int]) -> None:
    model = tiny(name, **options).eval()
    teacher = Teacher(model, VIEW)
    x = torch.randn(2, 3, 16, 16)
    features = teacher(x)
    assert (teacher.grid, features.cls) == (grid, None)
    torch.testing.assert_close(features.patches.mean(dim=1), model(x), rtol=1e-4, atol=1e-5)


def test_rejects_what_cannot_teach(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match=r"set --method.teacher to a run folder .* timm/NAME"):
        open_teacher(None, VIEW)
    with pytest.raises(UserError, match="no such run folder or exported backbone"):
        open_teacher(str(tmp_path / "nowhere"), VIEW)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"`python -m sslbook.train` makes runs/simclr-shapes"):
        open_teacher("runs/simclr-shapes", VIEW)
    with pytest.raises(UserError, match=r"Flatten makes no feature map .*forward_map"):
        Teacher(nn.Flatten(), VIEW)


def test_attention_of_single_token_is_one() -> None:
    torch.testing.assert_close(Attention(16, 4).first_row(torch.randn(2, 1, 16)), torch.ones(2, 1))
