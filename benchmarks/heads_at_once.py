"""All heads of a grid on one forward pass of a frozen backbone, against the same heads trained one after another."""

import argparse
from functools import partial

import torch
from timing import table, take_turns
from torch import nn

from sslbook import results
from sslbook.data.loader import Data
from sslbook.data.views import View
from sslbook.evaluation.augment import Augmentation
from sslbook.evaluation.classifier import OPTIMIZERS, Task, Training, Transfer
from sslbook.evaluation.heads import Attentive, Heads, feature, linear, shapes, tokens
from sslbook.evaluation.transfer import Setting, grid
from sslbook.nn import VisionTransformer
from sslbook.schedules import Clock

CLASSES = 10


def probe(shape: torch.Size, num_classes: int) -> nn.Module:
    return Attentive(shape[-1], num_classes, num_heads=6)


def steps(data: Data, backbone: nn.Module, task: Task, settings: list[Setting], batch: int, device: str) -> None:
    """One epoch of these heads side by side, augmentation and optimizer included."""
    example = torch.zeros(2, 3, 32, 32, device=device)
    dims = shapes(task.reading, backbone, example)
    heads = Heads([task.make_head(dims[0], CLASSES)], [0] * len(settings), False, [dims[0][-1]]).to(device)
    method = Transfer(backbone, heads, task, View(size=32), CLASSES, example)
    groups = [{"params": [*head.parameters()], "lr": s.lr} for head, s in zip(heads.each, settings)]
    optimizer = OPTIMIZERS["adamw"](groups)
    clock = Clock(0, 100, 100)
    for one in data.batches(method.views(), batch, seed=0, epoch=0, device=device):
        optimizer.zero_grad(set_to_none=True)
        method(one, clock)["loss"].backward()
        method.before_optimizer_step(clock)
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (options.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    data = Data.from_images(
        images, torch.arange(options.images) % CLASSES, class_names=[str(i) for i in range(CLASSES)]
    )
    backbone = VisionTransformer(32, 4, 192, 6, 6).to(options.device)
    settings = grid([10.0 ** (-1 - 3 * i / options.heads) for i in range(options.heads)])
    rows = {}
    for name, reading, head in (("linear", feature, lambda s, c: linear(s[-1], c)), ("attentive", tokens, probe)):
        task = Task(name, {}, head, Training(), Augmentation(), reading)
        run = partial(steps, data, backbone, task, batch=options.batch, device=options.device)

        def one_by_one(run: partial = run) -> None:
            for setting in settings:
                run([setting])

        sides = {f"{name}, at once": partial(run, settings), f"{name}, one by one": one_by_one}
        seconds = take_turns(sides, options.repetitions, options.device)
        print(f"{options.heads} {name} heads, ViT of 6 blocks, 32 pixels, {options.images} images, {options.device}")
        rows |= table(seconds, options.images * options.heads, "images x heads")
    if options.save:
        settings_ = {**vars(options), "threads": torch.get_num_threads()}
        print(results.save("benchmark_heads_at_once", rows, settings=settings_))


if __name__ == "__main__":
    main()
