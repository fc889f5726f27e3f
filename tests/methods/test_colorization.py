import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sslbook import nn as nets
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.colorization import (
    Colorization,
    annealed_mean,
    color_loss,
    lab_to_rgb,
    palette,
    rarity_weights,
    rgb_to_lab,
    soft_encode,
)
from sslbook.nn import ConvNet
from sslbook.schedules import Clock
from tests.methods.cases import CONVNET, VIEW, Case, Convolutions, make, make_batch, transformer

CASE = Case(
    options={"view": VIEW, "bin_width": 40.0, "decoder_dim": 8},
    command={"method.backbone": CONVNET, "method.bin_width": 40, "method.decoder_dim": 8},
    learned=lambda method, batch, out: bool(out["color_accuracy"] > 90),
    backbone=lambda: ConvNet(4),
    overfit={"backbone": ConvNet(16)},
    corners=[(2, 0.05, {}), (8, 0.05, {"stride": 2})],
    other_backbones=[transformer],
)


# Red, green, blue, yellow, cyan, magenta, white, black and a blue: values that color tables print (sRGB, D65).
@pytest.mark.parametrize(
    ("rgb", "lab"),
    [
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 255, 0), (87.73, -86.18, 83.18)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((255, 255, 0), (97.14, -21.55, 94.48)),
        ((0, 255, 255), (91.11, -48.09, -14.13)),
        ((255, 0, 255), (60.32, 98.23, -60.82)),
        ((255, 255, 255), (100.0, 0.0, 0.0)),
        ((0, 0, 0), (0.0, 0.0, 0.0)),
        ((56, 79, 132), (34.19, 8.07, -32.47)),
    ],
)
def test_rgb_to_lab_matches_published_colors(rgb: tuple, lab: tuple) -> None:
    got = rgb_to_lab(torch.tensor(rgb, dtype=torch.float64) / 255)
    torch.testing.assert_close(got, torch.tensor(lab, dtype=torch.float64), rtol=0, atol=6e-3)


def test_lab_to_rgb_is_the_inverse() -> None:
    rgb = torch.rand(500, 3, dtype=torch.float64)
    torch.testing.assert_close(lab_to_rgb(rgb_to_lab(rgb)), rgb, rtol=0, atol=1e-6)
    gray = torch.linspace(0, 1, 256)[:, None].expand(-1, 3)
    assert rgb_to_lab(gray)[:, 1:].abs().max() < 1e-3


@pytest.mark.slow
def test_bins_cover_all_colors() -> None:
    bins = palette(10.0)
    assert bins.shape == (261, 2)
    ab = rgb_to_lab(torch.rand(3000, 3))[:, 1:]
    off = (ab[:, None] - bins).abs().amax(dim=2).amin(dim=1)
    assert (off > 5.001).float().mean() < 0.01  # but for slivers of bins that the sample of colors missed
    assert off.max() < 8
    assert len(palette(40.0)) == len(make("colorization").bins)


def literal(logits: Tensor, ab: Tensor, bins: Tensor, frequency: Tensor, sigma: float, mix: float) -> float:
    """Equations 2 to 4, one pixel and one bin at a time."""
    points, total = bins.tolist(), len(bins)

    def gauss(p: list, q: list) -> float:
        return math.exp(-((p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2) / (2 * sigma**2))

    smooth = [0.0] * total
    for q in range(total):
        mass = sum(gauss(points[p], points[q]) for p in range(total))
        for p in range(total):
            smooth[p] += gauss(points[p], points[q]) / mass * float(frequency[q])
    weight = [1 / ((1 - mix) * s + mix / total) for s in smooth]
    mean = sum(s * w for s, w in zip(smooth, weight))
    loss = 0.0
    for i, color in enumerate(ab.tolist()):
        near = sorted(range(total), key=lambda q: (points[q][0] - color[0]) ** 2 + (points[q][1] - color[1]) ** 2)[:5]
        mass = sum(gauss(points[q], color) for q in near)
        log_sum = math.log(sum(math.exp(float(x)) for x in logits[i]))
        for q in near:
            z = gauss(points[q], color) / mass
            loss -= weight[near[0]] / mean * z * (float(logits[i, q]) - log_sum) / len(ab)
    return loss


@pytest.mark.parametrize(("n", "mix"), [(7, 0.5), (1, 0.1), (4, 1.0)])
def test_loss_is_equations_2_to_4(n: int, mix: float) -> None:
    bins = palette(40.0).double()
    ab, logits = 40 * torch.randn(n, 2).double(), torch.randn(n, len(bins)).double()
    frequency = torch.rand(len(bins)).double().softmax(dim=0)
    share, near = soft_encode(ab, bins, 20.0)
    weights = rarity_weights(frequency, bins, 20.0, mix)
    loss = float(color_loss(logits, share, near, weights))
    assert loss == pytest.approx(literal(logits, ab, bins, frequency, 20.0, mix), rel=1e-9)
    if mix == 1.0:
        torch.testing.assert_close(weights, torch.ones_like(weights))


@torch.no_grad()
def test_forward_is_equations_2_to_4() -> None:
    method = make("colorization")
    batch = make_batch(method, 3)
    lab = method.to_lab(batch.views[0])
    rgb = (batch.views[0][1, :, 6, 10] * torch.tensor(VIEW.std) + torch.tensor(VIEW.mean)).clamp(0, 1)
    torch.testing.assert_close(lab[1, 6, 10], rgb_to_lab(rgb), rtol=0, atol=1e-3)
    ab = lab[:, 2::4, 2::4, 1:].reshape(-1, 2)  # one pixel for each position of the map
    logits = method.predict(lab[..., 0]).reshape(len(ab), -1)
    method.train()
    loss = float(method(batch, Clock())["loss"])
    nearest = torch.cdist(ab, method.bins).argmin(dim=1)
    frequency = torch.stack([(nearest == i).float().mean() for i in range(len(method.bins))])
    torch.testing.assert_close(method.frequency, frequency)
    assert loss == pytest.approx(literal(logits, ab, method.bins, frequency, 20.0, 0.5), rel=1e-4)


def test_frequencies_average_over_all_batches() -> None:
    method = make("colorization")
    method.count(torch.tensor([0, 0, 1, 2]))
    method.count(torch.tensor([1, 1, 1, 1]))
    method.count(torch.tensor([2, 2, 2, 2]))
    assert method.frequency[:4].tolist() == pytest.approx([1 / 6, 5 / 12, 5 / 12, 0.0])


@torch.no_grad()
def test_initial_frequencies_are_uniform() -> None:
    method = make("colorization").eval()
    batch = make_batch(method, 3)
    loss = float(method(batch, Clock())["loss"])
    lab = method.to_lab(batch.views[0])
    ab, logits = lab[:, 2::4, 2::4, 1:].reshape(-1, 2), method.predict(lab[..., 0]).flatten(0, 2)
    uniform = torch.full((len(method.bins),), 1 / len(method.bins))
    assert loss == pytest.approx(literal(logits, ab, method.bins, uniform, 20.0, 0.5), rel=1e-4)
    method.count(torch.tensor([0, 0, 1, 2]))  # on which the initial value has no effect
    assert method.frequency[:4].tolist() == [0.5, 0.25, 0.25, 0.0]


def test_annealed_mean_lies_between_mean_and_mode() -> None:
    bins = torch.tensor([[0.0, 0.0], [10.0, 0.0], [10.0, 10.0]])
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
    torch.testing.assert_close(annealed_mean(logits, bins, 1.0), torch.tensor([[8.0, 3.0]]))
    torch.testing.assert_close(annealed_mean(logits, bins, 0.01), torch.tensor([[10.0, 0.0]]))
    p = [x ** (1 / 0.38) for x in (0.2, 0.5, 0.3)]
    expected = [[10 * (p[1] + p[2]) / sum(p), 10 * p[2] / sum(p)]]
    torch.testing.assert_close(annealed_mean(logits, bins), torch.tensor(expected))


@pytest.mark.parametrize("backbone", [CASE.backbone, transformer])
def test_features_do_not_depend_on_color(backbone: Callable[[], nn.Module]) -> None:
    method = make("colorization", backbone=backbone())
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-2)
    for step in range(5):
        optimizer.zero_grad()
        method(make_batch(method, 8, seed=step), Clock())["loss"].backward()
        optimizer.step()
    x = make_batch(method, 4).views[0]
    gray = x.mean(dim=1, keepdim=True).expand_as(x)
    method.eval()
    torch.testing.assert_close(method.backbone(x), method.backbone(gray), rtol=1e-3, atol=1e-4)


def share_of_red(rebalance: float) -> float:
    """Predicted probability of red for images of one lightness, of which four of five are gray and one is red."""
    method = make("colorization", rebalance=rebalance)
    optimizer = torch.optim.AdamW(method.parameters(), lr=2e-2)
    pixel = lab_to_rgb(torch.tensor([[55.0, 0.0, 0.0], [55.0, 40.0, 40.0]]))
    pixel = (pixel - torch.tensor(VIEW.mean)) / torch.tensor(VIEW.std)
    x = pixel[torch.tensor([0, 0, 0, 0, 1])][:, :, None, None].expand(-1, -1, 16, 16)
    for _ in range(40):
        optimizer.zero_grad()
        method(make_batch(method, 5)._replace(views=(x,)), Clock())["loss"].backward()
        optimizer.step()
    p = method.predict(method.to_lab(x)[..., 0]).softmax(dim=3).mean(dim=(0, 1, 2))
    return float(p[(method.bins > 0).all(dim=1)].sum().detach())


@pytest.mark.slow
def test_without_rebalancing_rare_colors_are_lost() -> None:
    assert share_of_red(0.5) > 0.26
    assert share_of_red(1.0) < 0.24


def test_reconstruction_keeps_the_lightness() -> None:
    method = make("colorization").eval()
    images = make_batch(method, 2).views[0]
    images = (images * 0.3).clamp(-0.5, 0.5)
    gray, colored = method.reconstruct(images, torch.arange(2))
    values = gray * torch.tensor(VIEW.std)[:, None, None] + torch.tensor(VIEW.mean)[:, None, None]
    assert values.std(dim=1).max() < 1e-3
    torch.testing.assert_close(method.to_lab(gray)[..., 0], method.to_lab(images)[..., 0], rtol=0, atol=1e-2)
    assert (method.to_lab(colored) - method.to_lab(gray))[..., 1:].abs().max() > 1


def test_full_scale_sizes() -> None:
    with torch.device("meta"):
        method = Colorization(nets.resnet50())
        assert method.decoder(torch.empty(1, 2048, 7, 7)).shape == (1, 261, 56, 56)  # a quarter of 224


def test_rejects_invalid_options() -> None:
    with pytest.raises(UserError, match="stride 5 does not divide images of 16 pixels"):
        make("colorization", stride=5)
    with pytest.raises(UserError, match=r"Colorization needs a feature map and cannot use a Convolutions"):
        make("colorization", backbone=Convolutions())
    assert make("colorization", view=View(size=20)).views()[0].size == 20


def test_loaded_weights_become_color_blind() -> None:
    method = make("colorization")
    (first, *_) = (m for m in method.backbone.modules() if isinstance(m, torch.nn.Conv2d))
    torch.nn.init.normal_(first.weight)
    gray = first.weight.mean(dim=1)
    method.on_weights_loaded(["backbone.conv1.weight"])
    for color in range(3):
        torch.testing.assert_close(first.weight[:, color], gray)
