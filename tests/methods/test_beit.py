import json
import math
from pathlib import Path

import pytest
import torch

from sslbook.data.masks import block_mask
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.beit import token_loss
from sslbook.nn import DiscreteEncoder, ResNet, VisionTransformer
from sslbook.schedules import Clock
from sslbook.weights.backbone import export_backbone
from tests.methods.cases import SIZE, TRANSFORMER, VIEW, Case, make, make_batch

RELATIVE = {**json.loads(TRANSFORMER)["init_args"], "positions": "relative", "layer_scale": 0.1}
ENCODER = {"patch_size": 4, "num_codes": 8, "dim": 64, "depth": 1}


def seeded_tokenizer() -> DiscreteEncoder:
    """The same in every process that imports this file."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DiscreteEncoder(**ENCODER)


CASE = Case(
    options={"view": VIEW, "tokenizer": seeded_tokenizer(), "num_masked": 6, "min_block": 2},
    command={
        "method.backbone": TRANSFORMER,
        "method.tokenizer": json.dumps({"class_path": "sslbook.nn.DiscreteEncoder", "init_args": ENCODER}),
        "method.num_masked": 6,
        "method.min_block": 2,
    },
    learned=lambda method, batch, out: bool(out["token_accuracy"] > 95),
    backbone=lambda: VisionTransformer(**RELATIVE),
    full_scale="vit_base",
    full_options=lambda: {"tokenizer": DiscreteEncoder()},
    overfit={"backbone": VisionTransformer(SIZE, 4, 64, 2, 4)},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {"num_masked": 9})],
)


def test_loss_against_literal_version() -> None:
    scores, codes = torch.randn(7, 5), torch.randint(5, (7,))
    expected = 0.0
    for row, code in zip(scores.double().tolist(), codes.tolist()):
        expected -= row[code] - math.log(sum(math.exp(s) for s in row))
    loss, accuracy = token_loss(scores, codes)
    assert float(loss) == pytest.approx(expected / 7, rel=1e-5)
    assert float(accuracy) == pytest.approx(100 * sum(int(s.argmax()) == int(c) for s, c in zip(scores, codes)) / 7)


@pytest.mark.parametrize("n", [3, 1])
def test_masked_patches_are_classified(n: int) -> None:
    method = make("beit")
    batch, clock = make_batch(method, n), Clock(seed=3)
    (images,) = batch.views
    masked = block_mask(batch.index, (4, 4), 6, clock, 2)
    codes = method.tokenizer(images)
    tokens = method.backbone.encode(method.backbone.embed(images, masked, method.mask_token))[:, 1:]
    losses = []
    for i in range(n):
        for j in range(16):
            if masked[i, j]:
                scores = method.head(tokens[i, j]).double().tolist()
                losses.append(math.log(sum(math.exp(s) for s in scores)) - scores[int(codes[i, j])])
    assert float(method(batch, clock)["loss"].detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_tokenizer_sees_whole_image_and_network_visible_patches() -> None:
    method = make("beit")
    batch = make_batch(method, 4)
    masked = block_mask(batch.index, (4, 4), 6, Clock(), 2)
    pixels = masked.unflatten(1, (4, 4)).repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    other = batch.views[0].masked_fill(pixels[:, None], 3.0)
    embed = method.backbone.embed
    assert torch.equal(embed(other, masked, method.mask_token), embed(batch.views[0], masked, method.mask_token))
    assert not torch.equal(method.tokenizer(other), method.tokenizer(batch.views[0]))


def test_tokenizer_is_frozen_and_saved() -> None:
    method = make("beit")
    assert not any(p.requires_grad for p in method.tokenizer.parameters())
    assert any(name.startswith("tokenizer.encoder") for name in method.state_dict())


def test_loss_is_zero_without_masked_patches() -> None:
    scores = torch.zeros(0, 8, requires_grad=True)
    loss, accuracy = token_loss(scores, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert (float(loss.detach()), float(accuracy)) == (0.0, 0.0)


def test_tokenizer_from_run_folder(tmp_path: Path) -> None:
    encoder = DiscreteEncoder(8, 32, 8, 1)
    facts = {"view": {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}}
    export_backbone(tmp_path / "backbone.safetensors", encoder, facts)
    method = make("beit", tokenizer=str(tmp_path))
    assert method.head.out_features == 32
    assert torch.equal(method.tokenizer.encoder.head.weight, encoder.head.weight)
    assert method.tokenizer(make_batch(method, 2).views[0]).shape == (2, 16)  # patches of 8: the image is enlarged
    with pytest.raises(UserError, match=r"there is no tokenizer: train one with python -m sslbook.train dvae"):
        make("beit", tokenizer=None)


def after_training(constant: bool) -> tuple[float, float]:
    """The loss after training, for the images themselves and for others: uniform ones, of four colors."""
    torch.manual_seed(0)
    method = make("beit", backbone=VisionTransformer(SIZE, 4, 32, 2, 4))
    colors = torch.tensor([[2.0, 2, 2], [2, -2, -2], [-2, 2, -2], [-2, -2, 2]])
    images = colors[torch.arange(16) % 4][:, :, None, None].expand(-1, -1, SIZE, SIZE).contiguous()

    class ColorTokenizer(torch.nn.Module):
        def forward(self, x):
            color = (x.mean(dim=(2, 3))[:, None] - colors).square().sum(dim=2).argmin(dim=1)
            return (color * 0 if constant else color)[:, None].expand(-1, 16)

    method.tokenizer = ColorTokenizer()
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    batch = make_batch(method, 16)._replace(views=(images,))
    for step in range(60):
        loss = method(batch, Clock(step, 60, 1))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    masked = block_mask(batch.index, (4, 4), 6, Clock(), 2)
    losses = []
    with torch.no_grad():
        for x in (images, images.roll(1, dims=0)):
            tokens = method.backbone.encode(method.backbone.embed(x, masked, method.mask_token))[:, 1:]
            losses.append(float(token_loss(method.head(tokens[masked]), method.tokenizer(images)[masked])[0]))
    return losses[0], losses[1]


@pytest.mark.slow
def test_with_a_constant_tokenizer_nothing_is_learned() -> None:
    own, other = after_training(constant=False)
    assert own < 0.2
    assert other > 10 * own  # the network uses the image
    own, other = after_training(constant=True)
    assert other == pytest.approx(own, abs=0.02)  # one code for all: the image is not needed
    assert own < 0.1


def test_paper_scale() -> None:
    with torch.device("meta"):
        network = VisionTransformer(positions="relative", layer_scale=0.1)
    # ViT-B without its table of positions, with 732 offsets for 12 heads, and two factors for each block's channels
    assert sum(p.numel() for p in network.parameters()) == 85_798_656 - 197 * 768 + 732 * 12 + 12 * 2 * 768
    mask = block_mask(torch.arange(2000), (14, 14), 75, Clock())
    assert mask.sum(dim=1).float().mean() == pytest.approx(74.5, abs=0.2)  # the authors' code, over 10,000 samples


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"BEiT .* cannot use a ResNet: choose .*VisionTransformer"):
        make("beit", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("beit", num_masked=0)
    with pytest.raises(UserError, match="leaves nothing to see: mask at least 1 and at most 15"):
        make("beit", num_masked=16)
    with pytest.raises(UserError, match="nearest size that works is 20x20"):
        make("beit", view=View(size=19))
