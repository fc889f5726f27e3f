import json
import math

import pytest
import torch
from torch import Tensor, nn

from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods import milan
from sslbook.methods.milan import cosine_loss, semantic_order
from sslbook.nn import ConvNet, ResNet, VisionTransformer
from sslbook.nn.mask_tokens import gather_tokens
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch, transformer


def seeded_teacher() -> VisionTransformer:
    """The same in every process that imports this file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VisionTransformer(SIZE, 4, 12, 1, 2)


TEACHER = seeded_teacher()
CASE = Case(
    options={"view": VIEW, "teacher": TEACHER, "decoder_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2},
    command={
        "method.backbone": TRANSFORMER,
        "method.teacher": json.dumps({"class_path": "sslbook.nn.ConvNet", "init_args": {"width": 4}}),
        "method.decoder_dim": 16,
        "method.decoder_num_heads": 2,
    },
    learned=lambda method, batch, out: bool(out["loss"] < 0.25),
    backbone=transformer,
    full_scale="vit_base",
    full_options=lambda: {"teacher": VisionTransformer()},
    overfit={
        "backbone": VisionTransformer(SIZE, 4, 64, 2, 4),
        "teacher": ConvNet(8),
        "decoder_dim": 64,
        "decoder_num_heads": 4,
    },
    overfit_lr=3e-3,
    corners=[(2, 0.05, {}), (8, 0.05, {"teacher": ConvNet(4)})],
)


@pytest.mark.parametrize(("n", "tokens", "dim"), [(1, 1, 2), (3, 5, 7)])
def test_cosine_loss_against_loops(n: int, tokens: int, dim: int) -> None:
    p, t = 10 * torch.randn(n, tokens, dim).double(), torch.randn(n, tokens, dim).double()
    rows = []
    for a, b in zip(p.flatten(0, 1).tolist(), t.flatten(0, 1).tolist()):
        a, b = ([x / sum(y * y for y in v) ** 0.5 for x in v] for v in (a, b))
        rows.append(sum((x - y) ** 2 for x, y in zip(a, b)))
    assert float(cosine_loss(p, t)) == pytest.approx(sum(rows) / len(rows), rel=1e-5)


def test_all_teacher_tokens_are_predicted() -> None:
    for teacher, tokens in ((TEACHER, 17), (ConvNet(4), 16)):
        method = make("milan", teacher=teacher)
        batch = make_batch(method, 3)
        features = method.teacher(batch.views[0])
        prediction, visible, masked = method.predict(batch.views[0], features, batch.index, Clock())
        assert (visible.shape, masked.shape) == ((3, 4), (3, 12))
        total, count = 0.0, 0
        for i in range(3):
            rows = [(k + 1, features.patches[i, j]) for k, j in enumerate(visible[i].tolist() + masked[i].tolist())]
            rows += [(0, features.cls[i])] if features.cls is not None else []
            for row, target in rows:
                p, t = prediction[i, row].double(), target.double()
                total += float((2 - 2 * (p @ t) / (p.norm() * t.norm())).detach())
                count += 1
        assert count == 3 * tokens
        out = method(batch, Clock())
        assert float(out["loss"].detach()) == pytest.approx(total / count, rel=1e-4)
        kept = sum(float(features.attention[i, j]) for i in range(3) for j in visible[i].tolist()) / 3
        assert float(out["visible_attention"]) == pytest.approx(kept, rel=1e-4)


def test_order_is_sampled_in_proportion_to_attention() -> None:
    weights = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    index, clock = torch.arange(20000), Clock(seed=3)
    order = semantic_order(weights.expand(20000, -1), index, clock)
    assert torch.equal(order.sort(dim=1).values, torch.arange(5).expand(20000, -1))
    first = order[:, 0].bincount(minlength=5) / 20000
    torch.testing.assert_close(first, weights, rtol=0, atol=0.015)
    # The second is sampled from what is left.
    second = order[order[:, 0] == 0, 1].bincount(minlength=5).float()
    torch.testing.assert_close(second / second.sum(), weights.where(weights < 0.5, 0) / 0.5, rtol=0, atol=0.02)
    assert bool((order[:, 4] == 4).all())  # patches without attention come last
    assert torch.equal(semantic_order(weights.expand(1, -1), index[7:8], clock)[0], order[7])
    assert not torch.equal(semantic_order(weights.expand(20000, -1), index, Clock(seed=4)), order)


class Spot(nn.Module):
    """A teacher that attends to bright patches alone."""

    def forward_map(self, x: Tensor) -> Tensor:
        bright = nn.functional.avg_pool2d(x.mean(dim=1, keepdim=True), 4).clamp_min(0)
        return torch.cat([bright, 0.1 * bright], dim=1)


def visible_of_spots(monkeypatch=None) -> float:
    """Fraction of the bright patches, a quarter of all, that the student sees."""
    method = make("milan", teacher=Spot())
    batch = make_batch(method, 32)
    bright = torch.rand(32, 16).argsort(dim=1) < 4
    images = (0.1 + bright.float()).view(32, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = images.expand(-1, 3, -1, -1)
    _, visible, _ = method.predict(images, method.teacher(images), batch.index, Clock())
    return float(bright.gather(1, visible).float().mean())


def test_attended_patches_stay_visible(monkeypatch) -> None:
    assert visible_of_spots() > 0.7
    even = milan.semantic_order
    monkeypatch.setattr(milan, "semantic_order", lambda a, *rest: even(torch.full_like(a, 1 / a.shape[1]), *rest))
    assert visible_of_spots() < 0.4  # without the teacher's attention: a quarter


def test_prompt_block_against_loops() -> None:
    torch.manual_seed(0)
    block = milan.PromptBlock(8, 2).double().requires_grad_(False)
    block.norm1.weight.normal_()
    x, prompts = torch.randn(3, 8).double(), 3 * torch.randn(4, 8).double()
    context = [*prompts, *[block.norm1(token) for token in x]]  # prompts as they are
    for i in range(3):
        q, attended = block.q(block.norm1(x[i])), []
        for head in range(2):
            part, values = slice(4 * head, 4 * head + 4), slice(8 + 4 * head, 12 + 4 * head)
            powers = [math.exp(float(q[part] @ block.kv(token)[part]) / 2) for token in context]
            attended.append(sum(p / sum(powers) * block.kv(token)[values] for p, token in zip(powers, context)))
        y = x[i] + block.proj(torch.cat(attended))
        expected = y + block.mlp(block.norm2(y)[None, None])[0, 0]
        torch.testing.assert_close(block(x[None], prompts[None])[0, i], expected)


def test_decoder_leaves_visible_patches_unchanged() -> None:
    method = make("milan", decoder_depth=2)
    batch = make_batch(method, 2)
    features = method.teacher(batch.views[0])
    prediction, visible, masked = method.predict(batch.views[0], features, batch.index, Clock())
    decoder, tokens = method.decoder, method.backbone.embed(batch.views[0])
    encoded = decoder.embed(method.backbone.encode(gather_tokens(tokens, visible)))
    encoded = torch.cat([encoded[:, :1], encoded[:, 1:] + decoder.positions[visible]], dim=1)
    torch.testing.assert_close(prediction[:, :5], decoder.predict(decoder.norm(encoded)))
    x = decoder.mask_token + decoder.positions[masked]
    for block in decoder.blocks:
        x = block(x, encoded)
    literal = decoder.predict(decoder.norm(x))
    torch.testing.assert_close(prediction[:, 5:], literal)
    weights, weight = list(method.backbone.blocks.parameters()), torch.randn(literal.shape)
    passed = torch.autograd.grad((literal * weight).sum(), weights)  # masked patches train the encoder too
    torch.testing.assert_close(torch.autograd.grad((prediction[:, 5:] * weight).sum(), weights), passed)
    with torch.no_grad():
        for parameter in decoder.blocks.parameters():
            parameter.add_(torch.randn_like(parameter))
    again, _, _ = method.predict(batch.views[0], features, batch.index, Clock())
    assert torch.equal(again[:, :5], prediction[:, :5])
    assert not torch.allclose(again[:, 5:], prediction[:, 5:])


def test_masked_patches_are_not_seen() -> None:
    method = make("milan")
    batch = make_batch(method, 2)
    features = method.teacher(batch.views[0])
    prediction, _, masked = method.predict(batch.views[0], features, batch.index, Clock())
    images = batch.views[0].clone()
    for i in range(2):
        for j in masked[i].tolist():
            images[i, :, j // 4 * 4 : j // 4 * 4 + 4, j % 4 * 4 : j % 4 * 4 + 4] = 9.0
    torch.testing.assert_close(method.predict(images, features, batch.index, Clock())[0], prediction)


def test_teacher_is_frozen() -> None:
    method = make("milan", teacher=ConvNet(4)).train()
    before = {key: value.clone() for key, value in method.teacher.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for step in range(3):
        method(make_batch(method, 4, seed=step), Clock(step))["loss"].backward()
        optimizer.step()
        method.after_step(Clock(step + 1))
    assert not any(module.training for module in method.teacher.modules())
    for key, value in method.teacher.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_paper_scale() -> None:
    with torch.device("meta"):
        method = milan.MILAN(VisionTransformer(), VisionTransformer())
    decoder = sum(p.numel() for p in method.decoder.parameters())
    blocks = 8 * (4 * (512 * 512 + 512) + 2 * 512 * 2048 + 2048 + 512 + 4 * 512)  # MAE's decoder blocks
    assert decoder == blocks + (768 * 512 + 512) + 512 + 2 * 512 + (512 * 768 + 768)
    assert method.teacher.grid == (14, 14)


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"cannot use a ResNet: choose .*VisionTransformer"):
        make("milan", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match=r"positions sincos or learned"):
        make("milan", backbone=VisionTransformer(SIZE, 4, 16, 1, 2, positions="relative"))
    with pytest.raises(UserError, match=r"there is no teacher: set --method.teacher to a run folder"):
        make("milan", teacher=None)
    with pytest.raises(UserError, match=r"2x2 patches and the student one of 4x4: .*--method.teacher_size 32"):
        make("milan", teacher=VisionTransformer(SIZE, 8, 16, 1, 2))
    make("milan", teacher=VisionTransformer(SIZE, 8, 16, 1, 2), teacher_size=32)
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("milan", mask_ratio=0.0)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("milan", mask_ratio=0.99)
    with pytest.raises(UserError, match="nearest size that works is 20x20"):
        make("milan", view=View(size=19))
