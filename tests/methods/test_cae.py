import json
import math

import pytest
import torch
import torch.nn.functional as F

from sslbook.data.masks import block_mask
from sslbook.errors import UserError
from sslbook.methods.cae import CAE, CrossBlock
from sslbook.nn import DiscreteEncoder, ResNet, VisionTransformer
from sslbook.nn.mask_tokens import gather_tokens
from sslbook.schedules import Clock
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch, transformer

ENCODER = {"patch_size": 4, "num_codes": 8, "dim": 64, "depth": 1}


def seeded_tokenizer() -> DiscreteEncoder:
    """The same in every process that imports this file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiscreteEncoder(**ENCODER)


CASE = Case(
    options={
        "view": VIEW,
        "tokenizer": seeded_tokenizer(),
        "num_masked": 6,
        "min_block": 2,
        "regressor_depth": 1,
        "decoder_depth": 1,
    },
    command={
        "method.backbone": TRANSFORMER,
        "method.tokenizer": json.dumps({"class_path": "sslbook.nn.DiscreteEncoder", "init_args": ENCODER}),
        "method.regressor_depth": 1,
        "method.decoder_depth": 1,
    },
    learned=lambda method, batch, out: bool(out["token_accuracy"] > 95),
    backbone=transformer,
    full_scale="vit_base",
    full_options=lambda: {"tokenizer": DiscreteEncoder()},
    overfit={"backbone": VisionTransformer(SIZE, 4, 64, 2, 4)},
    overfit_lr=2e-3,
    corners=[(2, 0.05, {"alignment_weight": 0.0})],
)


def test_masks_split_patches_in_order() -> None:
    method, index = make("cae"), torch.arange(20)
    visible, masked = method.sample_masks(index, Clock(seed=2))
    mask = block_mask(index, (4, 4), 6, Clock(seed=2), 2, exact=True)
    for i in range(20):
        assert masked[i].tolist() == mask[i].nonzero()[:, 0].tolist()
        assert sorted(visible[i].tolist() + masked[i].tolist()) == list(range(16))


@pytest.mark.parametrize("layer_scale", [None, 0.3])
def test_cross_attention_against_loops(layer_scale: float | None) -> None:
    torch.manual_seed(0)
    block = CrossBlock(8, 2, layer_scale).double().requires_grad_(False)
    for norm in (block.norm_q, block.norm_k, block.norm_v, block.norm2):  # no two alike
        norm.weight.normal_()
        norm.bias.normal_()
    x, x_positions = torch.randn(1, 3, 8).double(), torch.randn(1, 3, 8).double()
    context, context_positions = torch.randn(1, 4, 8).double(), torch.randn(1, 4, 8).double()
    tokens = [(context[0, i], context_positions[0, i]) for i in range(4)] + [
        (x[0, i], x_positions[0, i]) for i in range(3)
    ]
    scale = 1.0 if layer_scale is None else layer_scale
    for i in range(3):
        q = block.q(block.norm_q(x[0, i] + x_positions[0, i]))
        attended = []
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            keys = [block.k(block.norm_k(token + position))[part] for token, position in tokens]
            values = [block.v(block.norm_v(token))[part] for token, _ in tokens]  # without their positions
            powers = [math.exp(float(q[part] @ key) / 2) for key in keys]
            attended.append(sum(p / sum(powers) * v for p, v in zip(powers, values)))
        y = block.norm2(x[0, i] + scale * block.proj(torch.cat(attended)))
        expected = y + scale * block.mlp(y[None, None])[0, 0]
        torch.testing.assert_close(block(x, x_positions, context, context_positions)[0, i], expected)


def test_regressor_does_not_get_class_token() -> None:
    method = make("cae")
    tokens = method.backbone.embed(make_batch(method, 2).views[0])
    visible, masked = method.sample_masks(torch.arange(2), Clock())
    context = method.backbone.encode(gather_tokens(tokens, visible))[:, 1:]
    predicted = method.regressor(context, method.positions[visible], method.positions[masked])
    torch.testing.assert_close(method.predict(tokens, visible, masked)[0], predicted)


def test_decoder_gets_only_predicted_features_and_positions() -> None:
    method = make("cae", regressor_depth=2, decoder_depth=2)
    tokens, weight = method.backbone.embed(make_batch(method, 2).views[0]).detach(), torch.randn(2, 6, 8)
    visible, masked = method.sample_masks(torch.arange(2), Clock())
    context = method.backbone.encode(gather_tokens(tokens, visible))[:, 1:]
    regressor, positions = method.regressor, method.positions[masked]
    x = regressor.query.expand(positions.shape)
    for block in regressor.blocks:
        x = block(x, positions, context, method.positions[visible])
    y = regressor.norm(x) + positions
    for block in method.decoder:
        y = block(y)
    literal = method.head(method.norm(y))
    predicted, logits = method.predict(tokens, visible, masked)
    torch.testing.assert_close(predicted, regressor.norm(x))
    torch.testing.assert_close(logits, literal)
    weights = [*regressor.parameters(), *method.backbone.blocks.parameters()]
    expected = torch.autograd.grad((literal * weight).sum(), weights)
    torch.testing.assert_close(torch.autograd.grad((logits * weight).sum(), weights), expected)


def test_layer_scale_and_drop_path_follow_backbone() -> None:
    backbone = VisionTransformer(SIZE, 4, 16, 2, 2, layer_scale=0.1, drop_path=0.2)
    method = make("cae", backbone=backbone, regressor_depth=2, decoder_depth=3)
    assert [block.drop_path for block in method.decoder] == pytest.approx([0.0, 0.1, 0.2])
    for block in (*method.decoder, *method.regressor.blocks):
        assert all(torch.equal(scale.gamma, torch.full((16,), 0.1)) for scale in (block.ls1, block.ls2))


@pytest.mark.parametrize("n", [3, 1])
def test_loss_against_literal_version(n: int) -> None:
    method = make("cae", alignment_weight=0.7)
    batch, clock = make_batch(method, n), Clock(seed=3)
    (images,) = batch.views
    visible, masked = method.sample_masks(batch.index, clock)
    tokens = method.backbone.embed(images)
    predicted, logits = method.predict(tokens, visible, masked)
    features = method.backbone.encode(gather_tokens(tokens, masked))[:, 1:]
    codes = method.tokenizer(images)
    cross_entropies, squares = [], []
    for i in range(n):
        for j, patch in enumerate(masked[i].tolist()):
            s = logits[i, j].double().tolist()
            cross_entropies.append(math.log(sum(math.exp(v) for v in s)) - s[int(codes[i, patch])])
            squares += [(a - b) ** 2 for a, b in zip(predicted[i, j].tolist(), features[i, j].tolist())]
    expected = sum(cross_entropies) / len(cross_entropies) + 0.7 * sum(squares) / len(squares)
    assert float(method(batch, clock)["loss"].detach()) == pytest.approx(expected, rel=1e-4)


def test_alignment_target_has_no_gradient() -> None:
    method = make("cae", alignment_weight=0.7)
    batch = make_batch(method, 3)
    (images,) = batch.views
    visible, masked = method.sample_masks(batch.index, Clock())
    tokens = method.backbone.embed(images)
    predicted, logits = method.predict(tokens, visible, masked)
    features = method.backbone.encode(gather_tokens(tokens, masked))[:, 1:].detach()
    codes = method.tokenizer(images).gather(1, masked)
    literal = F.cross_entropy(logits.flatten(0, 1), codes.flatten()) + 0.7 * (predicted - features).square().mean()
    weights = [p for p in method.backbone.parameters() if p.requires_grad]
    expected = torch.autograd.grad(literal, weights)
    torch.testing.assert_close(torch.autograd.grad(method(batch, Clock())["loss"], weights), expected)


def test_encoder_sees_visible_patches_only() -> None:
    method = make("cae")
    batch = make_batch(method, 2)
    visible, masked = method.sample_masks(batch.index, Clock())
    tokens = method.backbone.embed(batch.views[0])
    other = tokens.scatter(1, masked[:, :, None].expand(-1, -1, 16), 9.0)
    for a, b in zip(method.predict(other, visible, masked), method.predict(tokens, visible, masked)):
        assert torch.equal(a, b)


def distance_after_training(alignment_weight: float) -> float:
    method = make("cae", alignment_weight=alignment_weight)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=3e-3)
    distance = 0.0
    for step in range(30):
        out = method(make_batch(method, 8, seed=step), Clock(step, 30))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        distance = float(out["alignment_loss"])
    return distance


@pytest.mark.slow
def test_without_alignment_predictions_leave_feature_space() -> None:
    assert distance_after_training(2.0) < 0.6 * distance_after_training(0.0)


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"CAE .* cannot use a ResNet: choose .*VisionTransformer"):
        make("cae", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="relative positions are not made: use positions sincos or learned"):
        make("cae", backbone=VisionTransformer(SIZE, 4, 16, 2, 2, positions="relative"))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("cae", num_masked=0)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("cae", num_masked=16)


def test_paper_scale() -> None:
    with torch.device("meta"):
        method = CAE(VisionTransformer(layer_scale=0.1), DiscreteEncoder())
        visible, masked = torch.zeros(2, 98).long(), torch.zeros(2, 98).long()
        predicted, logits = method.predict(torch.empty(2, 196, 768), visible, masked)
    assert (predicted.shape, logits.shape) == ((2, 98, 768), (2, 98, 8192))
    block = 12 * 768**2 + 13 * 768 + 2 * 768  # with layer scale
    backbone = 12 * block + (16 * 16 * 3 * 768 + 768) + 768 + 2 * 768
    assert round(backbone / 1e6) == 86  # as ViT-B is known
    assert sum(p.numel() for p in method.backbone.parameters()) == backbone
    # A block of the regressor has two norms more: for keys and values.
    assert sum(p.numel() for p in method.regressor.parameters()) == 4 * (block + 4 * 768) + 768 + 2 * 768
    assert sum(p.numel() for p in method.decoder.parameters()) == 4 * block
