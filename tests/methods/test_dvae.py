import math

import pytest
import torch

from sslbook.errors import UserError
from sslbook.methods.dvae import DVAE, gumbel_noise, gumbel_softmax, kl_to_uniform, perplexity
from sslbook.nn import DiscreteEncoder, ResNet
from sslbook.schedules import Clock
from tests.methods.cases import VIEW, Case, make, make_batch

ENCODER = (
    '{"class_path": "sslbook.nn.DiscreteEncoder", "init_args": {"patch_size": 4, "num_codes": 8, "dim": 8, "depth": 1}}'
)
CASE = Case(
    options={"view": VIEW},
    command={"method.backbone": ENCODER},
    learned=lambda method, batch, out: bool(out["squared_error"] < 0.85),  # 1 without learning: images are noise
    backbone=lambda: DiscreteEncoder(4, 8, 8, 1),
    full_scale="DiscreteEncoder",
    overfit={"backbone": DiscreteEncoder(4, 64, 64, 1)},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {})],
)


@pytest.mark.parametrize("n", [3, 1])
def test_loss_and_gradient_against_literal_version(n: int) -> None:
    method = make("dvae", kl_weight=0.3)
    batch, clock = make_batch(method, n), Clock(step=5, total_steps=10, seed=4)
    (images,) = batch.views
    logits = method.backbone.logits(images)
    noise = gumbel_noise(batch.index, 16, 8, clock)
    mixture = ((logits + noise) / ((1 + 1 / 16) / 2)).softmax(dim=2)  # halfway along the cosine
    reconstruction = method.decoder(mixture, 4)
    pairs = zip(reconstruction.flatten().tolist(), images.flatten().tolist())
    squared = sum((a - b) ** 2 for a, b in pairs) / images.numel()
    q = logits.double().softmax(dim=2).flatten(0, 1).tolist()
    divergence = sum(float(torch.tensor(p).log() + torch.tensor(8.0).log()) * p for row in q for p in row) / len(q)
    out, weights = method(batch, clock), list(method.parameters())
    literal = (reconstruction - images).square().mean() - 0.3 * torch.special.entr(logits.softmax(dim=2)).sum(
        dim=2
    ).mean()
    expected = torch.autograd.grad(literal, weights)  # through mixture and divergence alike
    torch.testing.assert_close(torch.autograd.grad(out["loss"], weights), expected)
    torch.testing.assert_close(out["code_perplexity"], perplexity(method.backbone.tokens(images), 8))
    assert float(out["squared_error"]) == pytest.approx(squared, rel=1e-4)
    assert float(out["loss"].detach()) == pytest.approx(squared + 0.3 * divergence, rel=1e-4)


def test_gumbel_noise_samples_from_softmax() -> None:
    """The greatest of logit plus noise is a sample from the softmax."""
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0])
    noise = gumbel_noise(torch.arange(4000), 5, 4, Clock(2, seed=3))
    assert noise.isfinite().all()
    sampled = (logits + noise).argmax(dim=2).flatten().bincount(minlength=4) / 20000
    torch.testing.assert_close(sampled, logits.softmax(dim=0), rtol=0, atol=0.015)
    one_hot = torch.nn.functional.one_hot((logits + noise).argmax(dim=2), 4).float()
    same = (one_hot[:, 0] * one_hot[:, 1]).sum(dim=1).mean()  # each patch is sampled independently
    assert float(same) == pytest.approx(float(logits.softmax(dim=0).square().sum()), abs=0.05)
    assert torch.equal(gumbel_noise(torch.tensor([7]), 5, 4, Clock(2, seed=3))[0], noise[7])
    assert not torch.equal(gumbel_noise(torch.tensor([7]), 5, 4, Clock(3, seed=3))[0], noise[7])


def test_gumbel_noise_is_finite_at_extreme_uniform_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One uniform number in 2^24 is the greatest below 1: with 64 images, 36 patches and 64 codes, every 114 steps."""
    ends = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24])
    monkeypatch.setattr("sslbook.rng.uniform", lambda *key: ends[None])
    noise = gumbel_noise(torch.tensor([0]), 2, 2, Clock()).flatten()
    assert noise.isfinite().all()
    assert (noise.diff() > 0).all()
    assert float(noise[3]) == pytest.approx(24 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_gumbel_softmax_against_formula(temperature: float) -> None:
    logits, noise = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    mixture = gumbel_softmax(logits, noise, temperature)
    for i in range(2):
        for j in range(3):
            powers = [(float(s) + float(g)) / temperature for s, g in zip(logits[i, j], noise[i, j])]
            powers = [math.exp(p - max(powers)) for p in powers]
            for k in range(4):
                assert float(mixture[i, j, k]) == pytest.approx(powers[k] / sum(powers), abs=1e-12)
    if temperature < 0.1:
        assert mixture.amax(dim=2).mean() > 0.9  # nearly one-hot


def test_kl_to_uniform_against_formula() -> None:
    logits = torch.randn(3, 5, 7, dtype=torch.float64)
    total = 0.0
    for row in logits.flatten(0, 1):
        powers = [math.exp(s) for s in row.tolist()]
        total += sum(p / sum(powers) * math.log(p / sum(powers) * 7) for p in powers)
    assert float(kl_to_uniform(logits)) == pytest.approx(total / 15)
    assert float(kl_to_uniform(torch.zeros(2, 2, 9))) == pytest.approx(0, abs=1e-6)
    assert float(kl_to_uniform(torch.tensor([[[99.0, 0.0, 0.0]]]))) == pytest.approx(math.log(3))


def test_perplexity_counts_codes_in_use() -> None:
    assert float(perplexity(torch.zeros(3, 4, dtype=torch.int64), 8)) == pytest.approx(1)
    assert float(perplexity(torch.arange(8).expand(2, -1), 8)) == pytest.approx(8)


def test_temperature_falls_along_half_a_cosine() -> None:
    temperature = make("dvae").temperature
    values = [temperature(Clock(i, 10)) for i in range(11)]
    assert (values[0], values[-1]) == (1.0, 0.0625)
    assert values == sorted(values, reverse=True)
    assert values[5] == pytest.approx((1 + 0.0625) / 2)


def worse_with_codes_alone(temperature: float, last: float) -> float:
    """Trains on 32 flat images with 8 codes; by how much the error grows when codes replace mixtures."""
    torch.manual_seed(0)
    method = make(
        "dvae",
        backbone=DiscreteEncoder(8, 8, 16, 0),
        temperature=temperature,
        last_temperature=last,
        kl_weight=0.0,
    )
    images = torch.randn(32, 3, 1, 1).expand(-1, -1, 16, 16).contiguous()
    batch = make_batch(method, 32)._replace(views=(images,))
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    out = {}
    for step in range(150):
        out = method(batch, Clock(step, 150))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    codes = torch.nn.functional.one_hot(method.backbone.tokens(images), 8).float()
    return float((method.decoder(codes, 2) - images).square().mean().detach() - out["squared_error"])


@pytest.mark.slow
def test_falling_temperature_lets_decoder_read_single_codes() -> None:
    """With the temperature kept high the decoder learns mixtures of codes and cannot decode single codes."""
    assert worse_with_codes_alone(1.0, 1 / 16) < 0.15
    assert worse_with_codes_alone(4.0, 4.0) > 0.3


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match=r"cannot use a ResNet: choose sslbook.nn.DiscreteEncoder"):
        DVAE(ResNet(18, width=8))
    with pytest.raises(UserError, match="nearest size that works is 16x16"):
        make("dvae", backbone=DiscreteEncoder(8, 8, 8, 1), view=VIEW.__class__(size=18))


def test_paper_scale() -> None:
    """Three halvings, two residual blocks, one logit per code."""
    with torch.device("meta"):
        encoder = DiscreteEncoder()
        assert encoder.logits(torch.empty(2, 3, 112, 112)).shape == (2, 14 * 14, 8192)
    halvings = (3 * 16 * 256 + 256) + 2 * (256 * 16 * 256 + 256)
    residuals = 2 * (256 * 9 * 256 + 256 + 256 * 256 + 256)
    assert sum(p.numel() for p in encoder.parameters()) == halvings + residuals + 256 * 8192 + 8192
