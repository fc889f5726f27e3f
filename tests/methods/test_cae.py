import math

import pytest
import torch
import torch.nn.functional as F

from sslbook.data.masks import block_mask
from sslbook.errors import UserError
from sslbook.methods.cae import CAE, CrossBlock, take
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
        "num_codes": 8,
        "tokenizer_steps": 2,
    },
    command={
        "method.backbone": TRANSFORMER,
        "method.regressor_depth": 1,
        "method.decoder_depth": 1,
        "method.num_codes": 8,
        "method.tokenizer_steps": 2,
    },
    learned=lambda method, batch, out: bool(out["token_accuracy"] > 95),
    backbone=transformer,
    full_scale="vit_base",
    overfit={"backbone": VisionTransformer(SIZE, 4, 64, 2, 4)},
    overfit_lr=2e-3,
    corners=[(2, 0.05, {"alignment": 0.0})],
)


def test_which_patches_are_hidden() -> None:
    method, index = make("cae"), torch.arange(20)
    visible, hidden = method.split(index, Clock(seed=2))
    mask = block_mask(index, (4, 4), 6, Clock(seed=2), 2, exact=True)
    for i in range(20):
        assert hidden[i].tolist() == mask[i].nonzero()[:, 0].tolist()
        assert sorted(visible[i].tolist() + hidden[i].tolist()) == list(range(16))


@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_cross_attention_by_loops(layer_scale: float | None) -> None:
    torch.manual_seed(0)
    block = CrossBlock(8, 2, layer_scale).double().requires_grad_(False)
    for norm in (block.norm_q, block.norm_k, block.norm_v, block.norm2):  # no two alike
        norm.weight.normal_()
        norm.bias.normal_()
    x, x_place = torch.randn(1, 3, 8).double(), torch.randn(1, 3, 8).double()
    context, context_place = torch.randn(1, 4, 8).double(), torch.randn(1, 4, 8).double()
    seen = [(context[0, i], context_place[0, i]) for i in range(4)] + [(x[0, i], x_place[0, i]) for i in range(3)]
    scale = 1.0 if layer_scale is None else layer_scale
    for i in range(3):
        q = block.q(block.norm_q(x[0, i] + x_place[0, i]))
        answer = []
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            keys = [block.k(block.norm_k(token + place))[part] for token, place in seen]
            values = [block.v(block.norm_v(token))[part] for token, _ in seen]  # without their places
            powers = [math.exp(float(q[part] @ key) / 2) for key in keys]
            answer.append(sum(p / sum(powers) * v for p, v in zip(powers, values)))
        y = block.norm2(x[0, i] + scale * block.proj(torch.cat(answer)))
        expected = y + scale * block.mlp(y[None, None])[0, 0]
        torch.testing.assert_close(block(x, x_place, context, context_place)[0, i], expected)


def test_the_regressor_does_not_get_the_class_token() -> None:
    method = make("cae")
    tokens = method.backbone.embed(make_batch(method, 2).views[0])
    visible, hidden = method.split(torch.arange(2), Clock())
    context = method.backbone.encode(take(tokens, visible))[:, 1:]
    guessed = method.regressor(context, method.positions[visible], method.positions[hidden])
    torch.testing.assert_close(method.guess(tokens, visible, hidden)[0], guessed)


def test_the_decoder_gets_the_guesses_and_their_places_alone() -> None:
    method = make("cae", regressor_depth=2, decoder_depth=2)
    tokens, weight = method.backbone.embed(make_batch(method, 2).views[0]).detach(), torch.randn(2, 6, 8)
    visible, hidden = method.split(torch.arange(2), Clock())
    context = method.backbone.encode(take(tokens, visible))[:, 1:]
    regressor, place = method.regressor, method.positions[hidden]
    x = regressor.query.expand(place.shape)
    for block in regressor.blocks:
        x = block(x, place, context, method.positions[visible])
    y = regressor.norm(x) + place
    for block in method.decoder:
        y = block(y)
    literal = method.head(method.norm(y))
    guessed, scores = method.guess(tokens, visible, hidden)
    torch.testing.assert_close(guessed, regressor.norm(x))
    torch.testing.assert_close(scores, literal)
    weights = [*regressor.parameters(), *method.backbone.blocks.parameters()]
    expected = torch.autograd.grad((literal * weight).sum(), weights)
    torch.testing.assert_close(torch.autograd.grad((scores * weight).sum(), weights), expected)


def test_layer_scale_and_drop_path_are_the_backbones() -> None:
    backbone = VisionTransformer(SIZE, 4, 16, 2, 2, layer_scale=0.1, drop_path=0.2)
    method = make("cae", backbone=backbone, regressor_depth=2, decoder_depth=3)
    assert [block.drop_path for block in method.decoder] == pytest.approx([0.0, 0.1, 0.2])
    for block in (*method.decoder, *method.regressor.blocks):
        assert all(torch.equal(scale.gamma, torch.full((16,), 0.1)) for scale in (block.ls1, block.ls2))


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


def test_no_gradient_passes_through_the_targets_of_the_alignment() -> None:
    method = make("cae", alignment=0.7)
    batch = make_batch(method, 3)
    (images,) = batch.views
    visible, hidden = method.split(batch.index, Clock())
    tokens = method.backbone.embed(images)
    guessed, scores = method.guess(tokens, visible, hidden)
    features = method.backbone.encode(take(tokens, hidden))[:, 1:].detach()
    codes = method.tokenizer(images).gather(1, hidden)
    literal = F.cross_entropy(scores.flatten(0, 1), codes.flatten()) + 0.7 * (guessed - features).square().mean()
    weights = [p for p in method.backbone.parameters() if p.requires_grad]
    expected = torch.autograd.grad(literal, weights)
    torch.testing.assert_close(torch.autograd.grad(method(batch, Clock())["loss"], weights), expected)


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


def test_paper_scale() -> None:
    with torch.device("meta"):
        method = CAE(VisionTransformer(layer_scale=0.1))
        visible, hidden = torch.zeros(2, 98).long(), torch.zeros(2, 98).long()
        guessed, scores = method.guess(torch.empty(2, 196, 768), visible, hidden)
    assert (guessed.shape, scores.shape) == ((2, 98, 768), (2, 98, 8192))
    block = 12 * 768**2 + 13 * 768 + 2 * 768  # with layer scale
    backbone = 12 * block + (16 * 16 * 3 * 768 + 768) + 768 + 2 * 768
    assert round(backbone / 1e6) == 86  # as ViT-B is known
    assert sum(p.numel() for p in method.backbone.parameters()) == backbone
    # A block of the regressor has two norms more: for keys and values.
    assert sum(p.numel() for p in method.regressor.parameters()) == 4 * (block + 4 * 768) + 768 + 2 * 768
    assert sum(p.numel() for p in method.decoder.parameters()) == 4 * block
