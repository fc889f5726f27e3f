import math
import re
from pathlib import Path

import pytest
import torch

from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.nn import DiscreteEncoder, ResNet, VQTokenizer
from sslbook.nn.tokenizers import (
    DiscreteDecoder,
    Tokenizer,
    falling_temperature,
    gumbel_noise,
    gumbel_softmax,
    kl_to_uniform,
    load_tokenizer,
    small_encoder,
    train_discrete,
)
from sslbook.weights.backbone import export_backbone

VIEW = View(size=16, crop=None, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def test_noise_draws_from_the_softmax() -> None:
    """The point of Gumbel noise: the greatest of score plus noise is distributed as the softmax says."""
    scores = torch.tensor([1.0, 0.0, -1.0, 2.0])
    noise = gumbel_noise(torch.arange(4000), 5, 4, seed=3, epoch=2)
    assert noise.isfinite().all()
    drawn = (scores + noise).argmax(dim=2).flatten().bincount(minlength=4) / 20000
    torch.testing.assert_close(drawn, scores.softmax(dim=0), rtol=0, atol=0.015)
    assert torch.equal(gumbel_noise(torch.tensor([7]), 5, 4, 3, 2)[0], noise[7])
    assert not torch.equal(gumbel_noise(torch.tensor([7]), 5, 4, 3, 3)[0], noise[7])


def test_noise_is_finite_at_the_ends_of_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """One draw in 2^24 is the greatest below 1: with 64 images, 36 patches and 64 codes it comes every 114 steps."""
    ends = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    monkeypatch.setattr("sslbook.rng.uniform", lambda *key: ends[None])
    noise = gumbel_noise(torch.tensor([0]), 2, 2, seed=0, epoch=0).flatten()
    assert noise.isfinite().all()
    assert (noise.diff() > 0).all()
    assert float(noise[3]) == pytest.approx(24 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_mixtures_from_the_formula(temperature: float) -> None:
    scores, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    mixture = gumbel_softmax(scores, noise, temperature)
    for i in range(2):
        for j in range(3):
            powers = [(float(s) + float(g)) / temperature for s, g in zip(scores[i, j], noise[i, j])]
            powers = [math.exp(p - max(powers)) for p in powers]
            for k in range(4):
                assert float(mixture[i, j, k]) == pytest.approx(powers[k] / sum(powers), abs=1e-12)
    if temperature < 0.1:
        assert mixture.amax(dim=2).mean() > 0.9  # nearly a draw of one


def test_divergence_from_the_formula() -> None:
    scores = torch.randn(3, 5, 7, dtype=torch.float64)
    total = 0.0
    for row in scores.flatten(0, 1):
        powers = [math.exp(s) for s in row.tolist()]
        total += sum(p / sum(powers) * math.log(p / sum(powers) * 7) for p in powers)
    assert float(kl_to_uniform(scores)) == pytest.approx(total / 15)
    assert float(kl_to_uniform(torch.zeros(2, 2, 9))) == pytest.approx(0, abs=1e-6)
    assert float(kl_to_uniform(torch.tensor([[[99.0, 0.0, 0.0]]]))) == pytest.approx(math.log(3))


def test_the_temperature_falls() -> None:
    values = [falling_temperature(1.0, 0.0625, i / 10) for i in range(11)]
    assert (values[0], values[-1]) == (1.0, 0.0625)
    assert values == sorted(values, reverse=True)
    assert values[5] == pytest.approx((1 + 0.0625) / 2)


@pytest.mark.parametrize("patch_size", [2, 4, 8])
def test_one_code_for_every_patch(patch_size: int) -> None:
    encoder = DiscreteEncoder(patch_size, 5, 8, 1)
    x = torch.randn(2, 3, 16, 24)
    scores = encoder.scores(x)
    assert scores.shape == (2, 16 * 24 // patch_size**2, 5)
    assert torch.equal(encoder.tokens(x), scores.argmax(dim=2))
    assert encoder(x).shape == (2, 8)
    assert DiscreteDecoder(patch_size, 5, 8, 1)(scores.softmax(dim=2), 16 // patch_size).shape == x.shape


def test_a_tokenizer_is_frozen_and_sees_its_own_images() -> None:
    encoder = DiscreteEncoder(4, 16, 8, 1)
    own = ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    tokenizer = Tokenizer(encoder, VIEW, 4, own).train()
    assert not tokenizer.encoder.training
    assert not any(p.requires_grad for p in tokenizer.parameters())
    pixels = torch.rand(2, 3, 16, 16)
    seen = (pixels - 0.5) / 0.25
    wanted = (pixels - torch.tensor(own[0])[:, None, None]) / torch.tensor(own[1])[:, None, None]
    assert torch.equal(tokenizer(seen), encoder.tokens(wanted))
    half = Tokenizer(encoder, VIEW, 2, own)  # patches of 8 pixels: the image is made half as large
    assert half(seen).shape == (2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer(seen), encoder.tokens(wanted))


def test_a_trained_one_is_loaded_and_others_are_refused(tmp_path: Path) -> None:
    encoder = DiscreteEncoder(4, 16, 8, 1)
    facts = {"view": {"size": 20, "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    export_backbone(tmp_path / "backbone.safetensors", encoder, facts)
    loaded, normalization, size = load_tokenizer(tmp_path, DiscreteEncoder, "dvae")
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.tokens(x), encoder.tokens(x))
    assert (normalization, size) == (((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), 20)
    export_backbone(tmp_path / "other.safetensors", ResNet(18, 4), facts)
    with pytest.raises(UserError, match=r"holds a ResNet, which makes no codes: train one with .* dvae"):
        load_tokenizer(tmp_path / "other.safetensors", DiscreteEncoder, "dvae")
    with pytest.raises(UserError, match="no such run; train it first"):
        load_tokenizer(tmp_path / "nothing", DiscreteEncoder, "dvae")


def test_training_one_here_is_deterministic_and_leaves_no_trace(capsys) -> None:
    data = Data(shapes=Shapes(num_train=64, num_test=8, size=16))
    made = []
    for _ in range(2):
        tokenizer = Tokenizer(small_encoder(4, 8), VIEW, 4)
        state = torch.get_rng_state()
        train_discrete(tokenizer, data, VIEW, 3, "beit")
        assert torch.equal(torch.get_rng_state(), state)
        made.append(tokenizer)
    for a, b in zip(made[0].parameters(), made[1].parameters()):
        assert torch.equal(a, b)
    said = capsys.readouterr().err
    assert "beit: no tokenizer given, so one is trained first, 3 steps" in said
    assert re.search(r"the tokenizer is done; squared error of images [\d.]+, \d+ of 8 codes in use", said)


def test_a_tokenizer_that_fails_says_so(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    data = Data(shapes=Shapes(num_train=64, size=16))
    tokenizer = Tokenizer(small_encoder(4, 8), VIEW, 4)
    constant = Data(shapes=Shapes(num_train=64, size=16))
    monkeypatch.setattr(
        constant,
        "batches",
        lambda *_, **__: iter(
            [Batch((torch.zeros(64, 3, 16, 16),), torch.arange(64), torch.zeros(64, dtype=torch.int64))]
        ),
    )
    train_discrete(tokenizer, constant, VIEW, 1, "beit")
    assert "beit: warning: all images have the same codes" in capsys.readouterr().err
    monkeypatch.setattr("sslbook.nn.tokenizers.gumbel_noise", lambda i, n, k, *_: torch.full((len(i), n, k), math.inf))
    with pytest.raises(UserError, match="the loss of the tokenizer became nan; train one with"):
        train_discrete(tokenizer, data, VIEW, 2, "beit")


def test_the_nearest_code_by_loops() -> None:
    tokenizer = VQTokenizer(16, 4, 16, 1, 2, num_codes=7, code_dim=3).eval()
    x = torch.randn(2, 3, 16, 16)
    places, tokens = tokenizer.places(x), tokenizer.tokens(x)
    assert places.shape == (2, 16, 3)
    for place, token in zip(places.flatten(0, 1), tokens.flatten().tolist()):
        distances = [float((place - code).norm()) for code in tokenizer.codebook]
        assert distances[token] == pytest.approx(min(distances))
    assert tokenizer(x).shape == (2, 16)
    assert torch.equal(Tokenizer(tokenizer, VIEW, 4)(x), tokens)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="not made by halving: use patch_size 16"):
        DiscreteEncoder(patch_size=14)
    with pytest.raises(UserError, match=r"1 code\(s\) say nothing"):
        DiscreteEncoder(num_codes=1)
    with pytest.raises(UserError, match=r"1 code\(s\) say nothing"):
        VQTokenizer(num_codes=1)
