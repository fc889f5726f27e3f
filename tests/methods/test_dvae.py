import pytest
import torch

from sslbook.errors import UserError
from sslbook.methods.dvae import DVAE, perplexity
from sslbook.nn import DiscreteEncoder, ResNet
from sslbook.nn.tokenizers import gumbel_noise
from sslbook.schedules import Clock
from tests.methods.cases import VIEW, Case, make, make_batch

ENCODER = (
    '{"class_path": "sslbook.nn.DiscreteEncoder", "init_args": {"patch_size": 4, "num_codes": 8, "dim": 8, "depth": 1}}'
)
CASE = Case(
    options={"view": VIEW},
    command={"method.backbone": ENCODER},
    learned=lambda method, batch, out: bool(out["squared_error"] < 0.85),  # 1 for who knows nothing: it is noise
    backbone=lambda: DiscreteEncoder(4, 8, 8, 1),
    full_scale="DiscreteEncoder",
    overfit={"backbone": DiscreteEncoder(4, 64, 64, 1)},
    overfit_lr=3e-3,
    corners=[(2, 0.05, {})],
)


@pytest.mark.parametrize("n", [3, 1])
def test_the_loss_is_the_papers(n: int) -> None:
    method = make("dvae", kl_weight=0.3)
    batch, clock = make_batch(method, n), Clock(step=5, total_steps=10, seed=4)
    (images,) = batch.views
    scores = method.backbone.scores(images)
    noise = gumbel_noise(batch.index, 16, 8, 4, clock.epoch)
    mixture = ((scores + noise) / ((1 + 1 / 16) / 2)).softmax(dim=2)  # halfway along the cosine
    drawn = method.decoder(mixture, 4)
    pairs = zip(drawn.flatten().tolist(), images.flatten().tolist())
    squared = sum((a - b) ** 2 for a, b in pairs) / images.numel()
    q = scores.double().softmax(dim=2).flatten(0, 1).tolist()
    divergence = sum(float(torch.tensor(p).log() + torch.tensor(8.0).log()) * p for row in q for p in row) / len(q)
    out, weights = method(batch, clock), list(method.parameters())
    literal = (drawn - images).square().mean() - 0.3 * torch.special.entr(scores.softmax(dim=2)).sum(dim=2).mean()
    expected = torch.autograd.grad(literal, weights)  # through mixture and divergence alike
    torch.testing.assert_close(torch.autograd.grad(out["loss"], weights), expected)
    torch.testing.assert_close(out["codes_in_use"], perplexity(method.backbone.tokens(images), 8))
    assert float(out["squared_error"]) == pytest.approx(squared, rel=1e-4)
    assert float(out["loss"].detach()) == pytest.approx(squared + 0.3 * divergence, rel=1e-4)


def test_the_noise_draws_codes_as_their_scores_say() -> None:
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    noise = gumbel_noise(torch.arange(2000), 5, 4, 0, 0)
    drawn = torch.nn.functional.one_hot((scores + noise).argmax(dim=2), 4).float()
    torch.testing.assert_close(drawn.mean(dim=(0, 1)), scores.exp(), rtol=0, atol=0.02)
    same = (drawn[:, 0] * drawn[:, 1]).sum(dim=1).mean()  # each patch is drawn by itself
    assert float(same) == pytest.approx(float(scores.exp().square().sum()), abs=0.05)


def test_how_many_codes_are_in_use() -> None:
    assert float(perplexity(torch.zeros(3, 4, dtype=torch.int64), 8)) == pytest.approx(1)
    assert float(perplexity(torch.arange(8).expand(2, -1), 8)) == pytest.approx(8)


def worse_with_codes_alone(temperature: float, last: float) -> float:
    """Trains on 32 flat images with 8 codes; by how much the error grows when codes take the place of mixtures."""
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


def test_falling_temperature_makes_codes_of_mixtures() -> None:
    """With the temperature kept high the decoder learns to read mixtures, and cannot read single codes."""
    assert worse_with_codes_alone(1.0, 1 / 16) < 0.15
    assert worse_with_codes_alone(4.0, 4.0) > 0.3


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"cannot use a ResNet: choose sslbook.nn.DiscreteEncoder"):
        DVAE(ResNet(18, width=8))
    with pytest.raises(UserError, match=r"cannot fall from 1\.0 to 2.0"):
        make("dvae", last_temperature=2.0)
    with pytest.raises(UserError, match="nearest size that works is 16x16"):
        make("dvae", backbone=DiscreteEncoder(8, 8, 8, 1), view=VIEW.__class__(size=18))


def test_full_scale() -> None:
    """Three halvings, two residual blocks, one score per code."""
    with torch.device("meta"):
        encoder = DiscreteEncoder()
        assert encoder.scores(torch.empty(2, 3, 112, 112)).shape == (2, 14 * 14, 8192)
    halvings = (3 * 16 * 256 + 256) + 2 * (256 * 16 * 256 + 256)
    residuals = 2 * (256 * 9 * 256 + 256 + 256 * 256 + 256)
    assert sum(p.numel() for p in encoder.parameters()) == halvings + residuals + 256 * 8192 + 8192
