"""The painted shapes and the variants of the chapter on colorization."""

import torch

from sslbook.book.chapters.colorization import variants
from sslbook.book.chapters.colorization.experiments import KNOBS, VIEW
from sslbook.book.chapters.experiments import batches
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.views import View
from sslbook.methods.colorization import rgb_to_lab
from sslbook.nn import ConvNet
from sslbook.schedules import Clock

TINY = Shapes(num_train=60, num_test=20, **KNOBS)


def train_images(colors: str, leak: bool = False) -> torch.Tensor:
    data = variants.painted(TINY, colors, leak=leak)
    return torch.stack([torch.as_tensor(data.values("train", i)) for i in range(60)])


def as_lab(images: torch.Tensor) -> torch.Tensor:
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    return rgb_to_lab(images.movedim(1, 3))


def test_gray_images_do_not_depend_on_the_rule_of_the_colors() -> None:
    lightness = {colors: as_lab(train_images(colors))[..., 0] for colors in ("by shape", "at random", "one")}
    gray = train_images("none")
    lightness["none"] = 100 * gray[:, 0].float() / (255 if gray.dtype == torch.uint8 else 1)
    for found in lightness.values():
        assert (found - lightness["one"]).abs().mean() < 0.3  # 8 bits, and colors that a screen cannot show
    assert (gray[:, 0] == gray[:, 2]).all()
    assert (as_lab(train_images("by shape")) - as_lab(train_images("at random")))[..., 1:].abs().mean() > 1


def test_with_a_leak_the_contrast_tells_the_color() -> None:
    color = variants.angles(torch.zeros(60, dtype=torch.long), "at random", TINY.seed)
    dark = as_lab(train_images("none", leak=True))[..., 0].mean((1, 2))
    light = {k: dark[color == k].std().item() for k in color.unique() if (color == k).sum() > 2}
    assert max(light.values()) < dark.std() / 2


def test_the_two_players_do_not_train_each_other() -> None:
    torch.manual_seed(0)
    method = variants.Adversarial(ConvNet(4), View(size=32), weight=0.5, overlap=1, decoder_dim=8)
    images = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    data = variants.Data.from_images(images, torch.zeros(8).long(), images, torch.zeros(8).long(), ("a",), "noise")
    (batch,) = batches(data, method.views(), 8, 1, seed=0)

    def gradients(weight: float) -> list[torch.Tensor]:
        method.weight = weight
        method.zero_grad()
        method(batch, Clock())["loss"].backward()
        return [p.grad.clone() for p in method.discriminator.parameters()]

    for a, b in zip(gradients(0.5), gradients(0.001), strict=True):
        torch.testing.assert_close(a, b)  # the encoder's wish to fool it does not reach the discriminator
    assert all(a.abs().max() > 0 for a in gradients(0.5))
    encoder = next(method.backbone.parameters()).grad.clone()
    method.discriminator[0].weight.data.mul_(2)
    gradients(0.5)
    assert (next(method.backbone.parameters()).grad - encoder).abs().max() > 0  # and it does feel the discriminator


def test_regression_predicts_two_numbers_and_its_gray_start_is_the_mean() -> None:
    torch.manual_seed(0)
    method = variants.Regression(ConvNet(4), VIEW, stride=4)
    (batch,) = batches(variants.painted(TINY, "at random"), (VIEW,), 60, 1, seed=0)
    assert method.predict(torch.zeros(2, 16, 16)).shape == (2, 4, 4, 2)
    for p in method.decoder.parameters():
        p.data.zero_()
    ab = method.to_lab(batch.views[0])[:, 2::4, 2::4, 1:] / variants.UNIT
    torch.testing.assert_close(method(batch, Clock())["loss"], ab.square().mean())
