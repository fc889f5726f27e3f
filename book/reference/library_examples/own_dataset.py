"""Your own data set: anything with `__len__` and `__getitem__`."""

import functools

import torch
from PIL import Image

import sslbook
from sslbook.methods import SimCLR
from sslbook.nn import ConvNet


class Checkers:
    """Checkerboards of two kinds: an item is an image, or an image and its class."""

    classes = ("fine", "coarse")

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        side = 2 if i % 2 == 0 else 6
        board = Image.new("RGB", (32, 32), (i % 200, 80, 120))
        for x in range(0, 32, 2 * side):
            for y in range(0, 32, side):
                shift = side * (y // side % 2)
                left = x + shift
                board.paste((230, 230, i % 250), (left, y, left + side, y + side))
        return board, i % 2


data = sslbook.Data(train=Checkers(64), test=Checkers(32), workers=0)
print(data.describe())
view = sslbook.View(size=16, crop=(0.3, 1.0), color_jitter=(0.4, 0.4, 0.4, 0.1))
adamw = functools.partial(torch.optim.AdamW, lr=1e-3)
run = sslbook.pretrain(SimCLR(ConvNet(8), view), data, adamw, batch_size=16, epochs=2)
print(run.clock.step, "steps, weights in", run.folder / "backbone.safetensors")
