import json
import math
from pathlib import Path

import pytest
import torch

from sslbook.data.loader import Data
from sslbook.data.masks import block_mask
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods import beit, load
from sslbook.methods.beit import token_loss
from sslbook.nn import DiscreteEncoder, ResNet, VisionTransformer
from sslbook.schedules import Clock
from sslbook.weights.backbone import export_backbone
from sslbook.weights.load import load_weights
from tests.methods.cases import SIZE, TINY_SHAPES, TRANSFORMER, VIEW, Case, case, make, make_batch

RELATIVE = {**json.loads(TRANSFORMER)["init_args"], "positions": "relative", "layer_scale": 0.1}
CASE = Case(
    options={"view": VIEW, "num_masked": 6, "min_block": 2, "num_codes": 8, "tokenizer_steps": 2},
    command={
        "method.backbone": TRANSFORMER,
        "method.num_masked": 6,
        "method.min_block": 2,
        "method.num_codes": 8,
        "method.tokenizer_steps": 2,
    },
    learned=lambda method, batch, out: bool(out["token_accuracy"] > 95),
    backbone=lambda: VisionTransformer(**RELATIVE),
    full_scale="vit_base",
    overfit={"backbone": VisionTransformer(SIZE, 4, 64, 2, 4)},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {"num_masked": 9})],
)


def test_the_loss_is_the_papers() -> None:
    scores, codes = torch.randn(7, 5), torch.randint(5, (7,))
    expected = 0.0
    for row, code in zip(scores.double().tolist(), codes.tolist()):
        expected -= row[code] - math.log(sum(math.exp(s) for s in row))
    loss, right = token_loss(scores, codes)
    assert float(loss) == pytest.approx(expected / 7, rel=1e-5)
    assert float(right) == pytest.approx(100 * sum(int(s.argmax()) == int(c) for s, c in zip(scores, codes)) / 7)


@pytest.mark.parametrize("n", [3, 1])
def test_hidden_patches_are_classified(n: int) -> None:
    method = make("beit")
    batch, clock = make_batch(method, n), Clock(seed=3)
    (images,) = batch.views
    hidden = block_mask(batch.index, (4, 4), 6, clock, 2)
    codes = method.tokenizer(images)
    tokens = method.backbone.encode(method.backbone.embed(images, hidden, method.mask_token))[:, 1:]
    losses = []
    for i in range(n):
        for j in range(16):
            if hidden[i, j]:
                scores = method.head(tokens[i, j]).double().tolist()
                losses.append(math.log(sum(math.exp(s) for s in scores)) - scores[int(codes[i, j])])
    assert float(method(batch, clock)["loss"].detach()) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_the_tokenizer_sees_all_and_the_network_not() -> None:
    method = make("beit")
    batch = make_batch(method, 4)
    hidden = block_mask(batch.index, (4, 4), 6, Clock(), 2)
    pixels = hidden.unflatten(1, (4, 4)).repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)
    other = batch.views[0].masked_fill(pixels[:, None], 3.0)
    embed = method.backbone.embed
    assert torch.equal(embed(other, hidden, method.mask_token), embed(batch.views[0], hidden, method.mask_token))
    assert not torch.equal(method.tokenizer(other), method.tokenizer(batch.views[0]))


def test_the_tokenizer_is_made_from_the_data_and_goes_round(capsys) -> None:
    one, two = make("beit", seed=0), make("beit", seed=1)
    for (name, a), b in zip(one.tokenizer.state_dict().items(), two.tokenizer.state_dict().values()):
        assert torch.equal(a, b), name  # whatever the seed
    assert not any(p.requires_grad for p in one.tokenizer.parameters())
    assert any(name.startswith("tokenizer.encoder") for name in one.state_dict())
    assert "one is trained first, 2 steps" in capsys.readouterr().err
    longer = make("beit", tokenizer_steps=4)
    assert not torch.equal(longer.tokenizer.encoder.head.weight, one.tokenizer.encoder.head.weight)


@pytest.mark.parametrize("name", ["beit", "cae"])
def test_a_tokenizer_is_trained_once(name: str, tmp_path: Path, capsys) -> None:
    method = make(name)
    had = method.tokenizer.encoder.head.weight.clone()
    capsys.readouterr()
    method.before_epoch(Data(shapes=TINY_SHAPES), Clock(2, 4, 2))  # a later epoch, or a run that was resumed
    torch.save(method.state_dict(), tmp_path / "state.pt")
    other = load(name)(case(name).backbone(), **case(name).options)
    other.on_weights_loaded(load_weights(other, tmp_path / "state.pt").taken)
    other.before_epoch(Data(shapes=TINY_SHAPES), Clock())
    assert torch.equal(other.tokenizer.encoder.head.weight, had)
    assert not capsys.readouterr().err


def test_where_nothing_is_hidden_the_loss_is_zero() -> None:
    scores = torch.zeros(0, 8, requires_grad=True)
    loss, right = token_loss(scores, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert (float(loss.detach()), float(right)) == (0.0, 0.0)


def test_a_tokenizer_of_ones_own(tmp_path: Path, capsys) -> None:
    encoder = DiscreteEncoder(8, 32, 8, 1)
    facts = {"view": {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}}
    export_backbone(tmp_path / "backbone.safetensors", encoder, facts)
    method = make("beit", tokenizer=tmp_path)
    assert method.head.out_features == 32
    assert torch.equal(method.tokenizer.encoder.head.weight, encoder.head.weight)
    assert method.tokenizer(make_batch(method, 2).views[0]).shape == (2, 16)  # patches of 8: the image is enlarged
    assert not capsys.readouterr().err
    export_backbone(tmp_path / "other.safetensors", ResNet(18, 4), facts)
    with pytest.raises(UserError, match=r"makes no codes: train one with python -m sslbook.train dvae"):
        make("beit", tokenizer=tmp_path / "other.safetensors")


def after_training(constant: bool) -> tuple[float, float]:
    """The loss after training, with the right images and with those of others: flat ones, of four colors."""
    torch.manual_seed(0)
    method = make("beit", backbone=VisionTransformer(SIZE, 4, 32, 2, 4))
    colors = torch.tensor([[2.0, 2, 2], [2, -2, -2], [-2, 2, -2], [-2, -2, 2]])
    kind = torch.arange(16) % 4
    images = colors[kind][:, :, None, None].expand(-1, -1, SIZE, SIZE).contiguous()

    class Words(torch.nn.Module):
        def forward(self, x):
            color = (x.mean(dim=(2, 3))[:, None] - colors).square().sum(dim=2).argmin(dim=1)
            return (color * 0 if constant else color)[:, None].expand(-1, 16)

    method.tokenizer = Words()
    optimizer = torch.optim.AdamW(method.parameters(), lr=3e-3)
    batch = make_batch(method, 16)._replace(views=(images,))
    for step in range(60):
        loss = method(batch, Clock(step, 60, 1))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    hidden = block_mask(batch.index, (4, 4), 6, Clock(), 2)
    losses = []
    with torch.no_grad():
        for shown in (images, images.roll(1, dims=0)):
            tokens = method.backbone.encode(method.backbone.embed(shown, hidden, method.mask_token))[:, 1:]
            losses.append(float(token_loss(method.head(tokens[hidden]), method.tokenizer(images)[hidden])[0]))
    return losses[0], losses[1]


def test_with_a_constant_tokenizer_nothing_is_learned() -> None:
    right, wrong = after_training(constant=False)
    assert right < 0.2
    assert wrong > 10 * right  # the network looks at the image
    right, wrong = after_training(constant=True)
    assert wrong == pytest.approx(right, abs=0.02), "it need not look: the answer is always the same"
    assert right < 0.1


def test_the_paper_scale() -> None:
    with torch.device("meta"):
        network = VisionTransformer(positions="relative", layer_scale=0.1)
    # ViT-B without its table of positions, with 732 offsets for 12 heads, and two factors for each block's channels
    assert sum(p.numel() for p in network.parameters()) == 85_798_656 - 197 * 768 + 732 * 12 + 12 * 2 * 768
    mask = block_mask(torch.arange(2000), (14, 14), 75, Clock())
    assert mask.sum(dim=1).float().mean() == pytest.approx(74.5, abs=0.2)  # the authors' code, over 10,000 draws


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"BEiT .* cannot use a ResNet: choose .*VisionTransformer"):
        make("beit", backbone=ResNet(18, width=8))
    with pytest.raises(UserError, match="leaves nothing to predict"):
        make("beit", num_masked=0)
    with pytest.raises(UserError, match="leaves nothing to see: mask at least 1 and at most 15"):
        make("beit", num_masked=16)
    with pytest.raises(UserError, match="nearest size that works is 20x20"):
        make("beit", view=View(size=19))
    with pytest.raises(UserError, match="say nothing: use at least 2"):
        beit.BEiT(VisionTransformer(**RELATIVE), view=VIEW, num_masked=6, min_block=2, num_codes=1).before_epoch(
            Data(shapes=TINY_SHAPES), Clock()
        )
