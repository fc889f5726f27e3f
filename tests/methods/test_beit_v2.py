import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sslbook.data.masks import block_mask
from sslbook.errors import UserError
from sslbook.methods import beit_v2
from sslbook.nn import DiscreteEncoder, ResNet, VisionTransformer, VQTokenizer
from sslbook.schedules import Clock
from sslbook.weights.backbone import export_backbone
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch, transformer

SMALL = {"image_size": SIZE, "patch_size": 4, "dim": 16, "depth": 1, "num_heads": 2, "num_codes": 8, "code_dim": 4}


def seeded_tokenizer() -> VQTokenizer:
    """The same in every process that imports this file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQTokenizer(**SMALL)


CASE = Case(
    options={"view": VIEW, "tokenizer": seeded_tokenizer(), "num_masked": 6, "min_block": 2, "early_layer": 1},
    command={
        "method.backbone": TRANSFORMER,
        "method.tokenizer": json.dumps(
            {"class_path": "sslbook.nn.VQTokenizer", "init_args": {**SMALL, "image_size": 24}}
        ),
        "method.early_layer": 1,
    },
    learned=lambda method, batch, out: bool(out["token_accuracy"] > 95),
    backbone=transformer,
    full_scale="vit_base",
    full_options=lambda: {"tokenizer": VQTokenizer()},
    overfit={"backbone": VisionTransformer(SIZE, 4, 64, 2, 4)},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {"aggregation_depth": 0})],
    other_backbones=[lambda: VisionTransformer(SIZE, 4, 16, 2, 2, positions="relative", layer_scale=0.1)],
)


@pytest.mark.parametrize("n", [3, 1])
def test_loss_against_literal_version(n: int) -> None:
    method = make("beit_v2")
    batch, clock = make_batch(method, n), Clock(seed=3)
    (images,) = batch.views
    masked = block_mask(batch.index, (4, 4), 6, clock, 2, exact=True)
    codes = method.tokenizer(images)
    early, last = method.backbone.layers(method.backbone.embed(images, masked, method.mask_token))
    x = torch.cat([last[:, :1], early[:, 1:]], dim=1)
    for block in method.aggregation.blocks:
        x = block(x)
    total = 0.0
    for output in (last, x):
        losses = []
        for i in range(n):
            for j in range(16):
                if masked[i, j]:
                    scores = method.head(method.backbone.norm(output[i, 1 + j])).double().tolist()
                    losses.append(math.log(sum(math.exp(s) for s in scores)) - scores[int(codes[i, j])])
        assert len(losses) == 6 * n
        total += sum(losses) / len(losses)
    assert float(method(batch, clock)["loss"].detach()) == pytest.approx(total, rel=1e-4)


def test_gradient_comes_from_both_predictions() -> None:
    """Through the last class token and the patches of the early layer, with positions in the aggregation too."""
    backbone = VisionTransformer(SIZE, 4, 16, 4, 2, positions="relative")
    method = make("beit_v2", backbone=backbone, early_layer=2)
    torch.nn.init.normal_(backbone.rel_pos_bias.table)
    batch, clock = make_batch(method, 3), Clock(seed=3)
    (images,) = batch.views
    masked = block_mask(batch.index, (4, 4), 6, clock, 2, exact=True)
    codes = method.tokenizer(images)[masked]
    _, early, _, last = backbone.layers(backbone.embed(images, masked, method.mask_token))
    x = torch.cat([last[:, :1], early[:, 1:]], dim=1)
    for block in method.aggregation.blocks:
        x = block(x, backbone.rel_pos_bias())
    scores = [method.head(backbone.norm(output)[:, 1:][masked]) for output in (last, x)]
    literal = F.cross_entropy(scores[0], codes) + F.cross_entropy(scores[1], codes)
    weights = [p for p in method.parameters() if p.requires_grad]
    expected = torch.autograd.grad(literal, weights)
    torch.testing.assert_close(torch.autograd.grad(method(batch, clock)["loss"], weights), expected)


def test_every_image_masks_equally_many_patches() -> None:
    method, seen = make("beit_v2", num_masked=7, min_block=4), []
    predict = method.predict
    method.predict = lambda images, masked: seen.append(masked) or predict(images, masked)
    method(make_batch(method, 64), Clock())
    assert seen[0].sum(dim=1).tolist() == [7] * 64


def test_aggregation_trains_last_blocks_through_class_token(monkeypatch) -> None:
    """The aggregation's gradient reaches the last blocks through the class token alone."""

    def gradient_of_last_block() -> float:
        method = make("beit_v2")
        batch = make_batch(method, 4)
        masked = block_mask(batch.index, (4, 4), 6, Clock(), 2, exact=True)
        _, scores = method.predict(batch.views[0], masked)
        scores.logsumexp(dim=1).sum().backward()
        weight = method.backbone.blocks[-1].mlp.fc2.weight
        return 0.0 if weight.grad is None else float(weight.grad.norm())

    assert gradient_of_last_block() > 0
    real = beit_v2.Aggregation.forward
    monkeypatch.setattr(beit_v2.Aggregation, "forward", lambda self, early, last, bias: real(self, early, early, bias))
    assert gradient_of_last_block() == 0


def test_aggregation_has_layer_scale_and_drop_path_of_backbone() -> None:
    backbone = VisionTransformer(SIZE, 4, 16, 4, 2, layer_scale=0.1, drop_path=0.3)
    method = make("beit_v2", backbone=backbone, early_layer=2)
    # The backbone's blocks drop 0, 0.1, 0.2, 0.3: those after the second are 0.2 and 0.3.
    assert [block.drop_path for block in method.aggregation.blocks] == pytest.approx([0.2, 0.3])
    for block in method.aggregation.blocks:
        assert all(torch.equal(scale.gamma, torch.full((16,), 0.1)) for scale in (block.ls1, block.ls2))


def test_tokenizer_from_run_folder(tmp_path: Path) -> None:
    tokenizer = seeded_tokenizer()
    facts = {"view": {"size": 16, "mean": [0.5] * 3, "std": [0.25] * 3}}
    export_backbone(tmp_path / "backbone.safetensors", tokenizer, facts)
    method = make("beit_v2", tokenizer=str(tmp_path))
    images = torch.randn(2, 3, SIZE, SIZE)
    pixels = images * torch.tensor(VIEW.std)[:, None, None] + torch.tensor(VIEW.mean)[:, None, None]
    assert torch.equal(method.tokenizer(images), tokenizer.tokens((pixels - 0.5) / 0.25))
    export_backbone(tmp_path / "other.safetensors", DiscreteEncoder(4, 8, 8, 1), facts)
    with pytest.raises(UserError, match=r"a VQTokenizer is needed: train one with python -m sslbook.train vqkd"):
        make("beit_v2", tokenizer=str(tmp_path / "other.safetensors"))


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"BEiT v2 .* cannot use a ResNet: choose .*VisionTransformer"):
        make("beit_v2", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match=r"there is no tokenizer: .* vqkd and set --method\.tokenizer"):
        make("beit_v2", tokenizer=None)
    with pytest.raises(UserError, match="a DiscreteEncoder cannot be the tokenizer, a VQTokenizer is needed"):
        make("beit_v2", tokenizer=DiscreteEncoder(4, 8, 8, 1))
    with pytest.raises(UserError, match=r"no such run folder or file; train one with python -m sslbook.train vqkd"):
        make("beit_v2", tokenizer="runs/nothing")
    with pytest.raises(UserError, match="tokenizer has 2x2 codes and the backbone 4x4 patches: use patch_size 8"):
        make("beit_v2", tokenizer=VQTokenizer(**{**SMALL, "patch_size": 8}))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("beit_v2", num_masked=0)
    with pytest.raises(UserError, match="leaves nothing to see"):
        make("beit_v2", num_masked=16)
    with pytest.raises(UserError, match="is not before the last of 2 blocks: use 1"):
        make("beit_v2", early_layer=2)


def test_paper_scale() -> None:
    with torch.device("meta"):
        method = beit_v2.BEiTv2(VisionTransformer(positions="relative", layer_scale=0.1), VQTokenizer())
        tokens, bias = torch.empty(2, 197, 768), method.backbone.rel_pos_bias()
        assert method.head(method.aggregation(tokens, tokens, bias)).shape == (2, 197, 8192)
    block = 12 * 768**2 + 13 * 768 + 2 * 768  # with layer scale
    table = ((2 * 14 - 1) ** 2 + 3) * 12
    backbone = 12 * block + (16 * 16 * 3 * 768 + 768) + 768 + 2 * 768 + table
    assert round(backbone / 1e6) == 86  # as ViT-B is known
    assert sum(p.numel() for p in method.backbone.parameters()) == backbone
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert trained == backbone + 2 * block + 768 + 768 * 8192 + 8192
