import json

import pytest
import torch
from torch import nn

from sslbook import rng
from sslbook.data.masks import block_mask
from sslbook.errors import UserError
from sslbook.methods.eva import EVA, cosine_loss
from sslbook.nn import ConvNet, ResNet, VisionTransformer, vit_giant
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch, transformer


def seeded_teacher() -> VisionTransformer:
    """The same in every process that imports this file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VisionTransformer(SIZE, 4, 12, 1, 2)


TEACHER = seeded_teacher()
CASE = Case(
    options={"view": VIEW, "teacher": TEACHER, "min_block": 2},
    command={
        "method.backbone": TRANSFORMER,
        "method.teacher": json.dumps({"class_path": "sslbook.nn.ConvNet", "init_args": {"width": 4}}),
    },
    learned=lambda method, batch, out: bool(out["loss"] < 0.2),
    backbone=transformer,
    full_scale="vit_giant",
    full_options=lambda: {"teacher": VisionTransformer(patch_size=14)},
    overfit={"backbone": VisionTransformer(SIZE, 4, 64, 2, 4), "teacher": ConvNet(8)},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {})],
    other_backbones=[lambda: VisionTransformer(SIZE, 4, 16, 2, 2, positions="relative", layer_scale=0.1)],
)


@pytest.mark.parametrize(("rows", "dim"), [(1, 2), (7, 5)])
def test_cosine_loss_against_loops(rows: int, dim: int) -> None:
    p, t = 10 * torch.randn(rows, dim).double(), torch.randn(rows, dim).double()
    total = 0.0
    for a, b in zip(p.tolist(), t.tolist()):
        cos = sum(x * y for x, y in zip(a, b)) / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5
        total += 2 - 2 * cos
    assert float(cosine_loss(p, t)) == pytest.approx(total / rows, rel=1e-5)


def test_only_masked_patches_are_predicted() -> None:
    method = make("eva")
    batch = make_batch(method, 5)
    mask = method.sample_masks(batch.index, (4, 4), Clock())
    assert mask.sum(dim=1).tolist() == [7] * 5  # 0.41 of 16
    features = method.teacher(batch.views[0])
    tokens = method.backbone.encode(method.backbone.embed(batch.views[0], mask, method.mask_token))
    rows = cosine_loss(method.head(tokens[:, 1:])[mask], features.patches[mask])
    total, count = 0.0, 0
    for i in range(5):
        for j in range(16):
            if mask[i, j]:
                p, t = method.head(tokens[i, 1 + j]).double(), features.patches[i, j].double()
                total, count = total + float((2 - 2 * (p @ t) / (p.norm() * t.norm())).detach()), count + 1
    loss, weights = method(batch, Clock())["loss"], list(method.backbone.blocks.parameters())
    assert float(loss.detach()) == pytest.approx(total / count, rel=1e-4)
    torch.testing.assert_close(torch.autograd.grad(loss, weights), torch.autograd.grad(rows, weights))


def test_masks_are_blocks_and_differ_between_images() -> None:
    method, index, clock = make("eva", min_block=16), torch.arange(100), Clock(seed=1)
    mask = method.sample_masks(index, (14, 14), clock)
    assert mask.sum(dim=1).tolist() == [80] * 100  # 0.41 of 196
    assert len(mask.unique(dim=0)) == 100
    assert torch.equal(method.sample_masks(index[7:8], (14, 14), clock)[0], mask[7])
    assert torch.equal(mask, block_mask(index, (14, 14), 80, clock, 16, exact=True, stream=rng.METHOD + 1))
    grid = mask.view(100, 14, 14)
    beside = (grid[:, :, 1:] & grid[:, :, :-1]).sum() / grid[:, :, 1:].sum()
    assert beside > 0.7  # neighbors are masked together: at random 0.41


def loss_after_training() -> float:
    """On images whose patches have nothing to do with each other, with a teacher that sees each patch separately."""
    torch.manual_seed(0)
    teacher = nn.Conv2d(3, 8, 4, stride=4)
    method = make("eva", backbone=VisionTransformer(SIZE, 4, 32, 1, 4), teacher=teacher)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(80):
        patches = torch.randn(16, 3, 4, 4).repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)
        loss = method(make_batch(method, 16)._replace(views=(patches,)), Clock())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.slow
def test_without_mask_token_it_copies(monkeypatch) -> None:
    assert loss_after_training() > 1.2
    embed = VisionTransformer.embed
    # The mask token still gets a gradient, but covers nothing.
    monkeypatch.setattr(VisionTransformer, "embed", lambda self, x, mask, token: embed(self, x) + 0 * token)
    assert loss_after_training() < 0.4


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"cannot use a ResNet: choose .*VisionTransformer"):
        make("eva", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match=r"there is no teacher: set --method.teacher to a run folder"):
        make("eva", teacher=None)
    with pytest.raises(UserError, match=r"2x2 patches and the student one of 4x4: .*--method.teacher_size 32"):
        make("eva", teacher=VisionTransformer(SIZE, 8, 16, 1, 2))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("eva", mask_ratio=0.0)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("eva", mask_ratio=1.0)


def test_teacher_is_frozen() -> None:
    method = make("eva", teacher=ConvNet(4)).train()
    before = {key: value.clone() for key, value in method.teacher.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for step in range(3):
        method(make_batch(method, 4, seed=step), Clock(step))["loss"].backward()
        optimizer.step()
    assert not any(module.training for module in method.teacher.modules())
    for key, value in method.teacher.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_paper_scale() -> None:
    with torch.device("meta"):
        method = EVA(vit_giant(), VisionTransformer(224, 14, 1024, 24, 16))  # the teacher as large as CLIP's ViT-L/14
        assert method.backbone.encode(torch.empty(2, 256, 1408)).shape == (2, 257, 1408)
    block = 4 * (1408**2 + 1408) + 2 * 1408 * 6144 + 6144 + 1408 + 4 * 1408
    backbone = 40 * block + (14 * 14 * 3 * 1408 + 1408) + 1408 + 2 * 1408
    assert round(backbone / 1e6) == 1011  # the paper's 1.0 billion
    assert sum(p.numel() for p in method.backbone.parameters()) == backbone
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == backbone + 1408 + 1408 * 1024 + 1024
    assert method.teacher.grid == (16, 16)
