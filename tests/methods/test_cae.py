import math

import pytest
import torch

from sslbook.data.masks import block_mask
from sslbook.errors import UserError
from sslbook.methods.cae import CrossBlock, take
from sslbook.nn import ResNet, VisionTransformer
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch, transformer

CASE = Case(
    options={
        "view": VIEW,
        "num_masked": 6,
        "min_block": 2,
        "regressor_depth": 1,
        "decoder_depth": 1,
        "codes": 8,
        "tokenizer_steps": 2,
    },
    command={
        "method.backbone": TRANSFORMER,
        "method.regressor_depth": 1,
        "method.decoder_depth": 1,
        "method.codes": 8,
        "method.tokenizer_steps": 2,
    },
    learned=lambda method, batch, out: bool(out["token_accuracy"] > 95),
    backbone=transformer,
    full_scale="vit_base",
    overfit={"backbone": VisionTransformer(SIZE, 4, 64, 2, 4)},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {"alignment": 0.0})],
)


def test_which_patches_are_hidden() -> None:
    method, index = make("cae"), torch.arange(20)
    visible, hidden = method.split(index, Clock(seed=2))
    mask = block_mask(index, (4, 4), 6, Clock(seed=2), 2, exact=True)
    for i in range(20):
        assert hidden[i].tolist() == mask[i].nonzero()[:, 0].tolist()
        assert sorted(visible[i].tolist() + hidden[i].tolist()) == list(range(16))


def test_cross_attention_by_loops() -> None:
    torch.manual_seed(0)
    block = CrossBlock(8, 2).double().requires_grad_(False)
    x, x_place = torch.randn(1, 3, 8).double(), torch.randn(1, 3, 8).double()
    context, context_place = torch.randn(1, 4, 8).double(), torch.randn(1, 4, 8).double()
    everything = block.norm_kv(torch.cat([context + context_place, x + x_place], dim=1))[0]
    for i in range(3):
        q = block.q(block.norm_q(x + x_place))[0, i]
        answer = []
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            keys, values = block.kv(everything)[:, :8][:, part], block.kv(everything)[:, 8:][:, part]
            powers = [math.exp(float(q[part] @ key) / 2) for key in keys]
            answer.append(sum(p / sum(powers) * v for p, v in zip(powers, values)))
        y = x[0, i] + block.proj(torch.cat(answer))
        expected = y + block.mlp(block.norm2(y)[None, None])[0, 0]
        torch.testing.assert_close(block(x, x_place, context, context_place)[0, i], expected)


@pytest.mark.parametrize("n", [3, 1])
def test_the_loss_is_the_papers(n: int) -> None:
    method = make("cae", alignment=0.7)
    batch, clock = make_batch(method, n), Clock(seed=3)
    (images,) = batch.views
    visible, hidden = method.split(batch.index, clock)
    tokens = method.backbone.embed(images)
    guessed, scores = method.guess(tokens, visible, hidden)
    features = method.backbone.encode(take(tokens, hidden))[:, 1:]
    codes = method.tokenizer(images)
    said, squares = [], []
    for i in range(n):
        for j, place in enumerate(hidden[i].tolist()):
            s = scores[i, j].double().tolist()
            said.append(math.log(sum(math.exp(v) for v in s)) - s[int(codes[i, place])])
            squares += [(a - b) ** 2 for a, b in zip(guessed[i, j].tolist(), features[i, j].tolist())]
    expected = sum(said) / len(said) + 0.7 * sum(squares) / len(squares)
    assert float(method(batch, clock)["loss"].detach()) == pytest.approx(expected, rel=1e-4)


def test_the_encoder_sees_the_visible_patches_only() -> None:
    method = make("cae")
    batch = make_batch(method, 2)
    visible, hidden = method.split(batch.index, Clock())
    tokens = method.backbone.embed(batch.views[0])
    other = tokens.scatter(1, hidden[:, :, None].expand(-1, -1, 16), 9.0)
    for a, b in zip(method.guess(other, visible, hidden), method.guess(tokens, visible, hidden)):
        assert torch.equal(a, b)


def distance_after_training(alignment: float) -> float:
    method = make("cae", alignment=alignment)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    distance = 0.0
    for step in range(30):
        out = method(make_batch(method, 8, seed=step), Clock(step, 30))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        distance = float(out["distance"])
    return distance


def test_without_alignment_guesses_are_no_features() -> None:
    assert distance_after_training(2.0) < 0.6 * distance_after_training(0.0)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"CAE .* cannot use a ResNet: choose .*VisionTransformer"):
        make("cae", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="relative positions are not made: use sincos or learned"):
        make("cae", backbone=VisionTransformer(SIZE, 4, 16, 2, 2, positions="relative"))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("cae", num_masked=0)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("cae", num_masked=16)
