"""Training at paper scale on one device: images per second, memory, and the share of the device's own matrix rate.

The methods are those of their ImageNet recipes; the images are random, lie on the device as bytes and go through the
recipes' views there, so that what is measured is all of a step but reading files. The share is the floating-point
operations of forward and backward pass (torch's counter, which knows convolutions and matrix products) per second,
divided by what a large matrix product of the same precision reaches in the same run.
"""

import argparse
from functools import partial

import torch
from timing import table, take_turns
from torch.utils.flop_counter import FlopCounterMode

from sslbook import results
from sslbook.cli.recipes import resolve
from sslbook.data.executors import apply_batch
from sslbook.data.loader import Batch
from sslbook.methods.base import Method
from sslbook.schedules import Clock
from sslbook.train import pretrain

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def build(method: str) -> Method:
    """The method of a recipe for ImageNet; the data, which are not needed, stay undrawn."""
    parser, config, _ = resolve([method, "--recipe", "imagenet", "--data.name", "shapes"], pretrain)
    return parser.construct(config).method


def matrix_rate(device: str, dtype: torch.dtype, side: int) -> float:
    """Floating-point operations per second of a product of two square matrices: the best of ten."""
    a, b = torch.randn(2, side, side, device=device, dtype=dtype).unbind()
    seconds = take_turns({"product": lambda: a @ b}, 10, device)["product"]
    return 2 * side**3 / min(seconds)


class Training:
    """Steps of a method on images that lie on the device."""

    def __init__(self, name: str, batch: int, device: str, precision: str, channels_last: bool) -> None:
        torch.manual_seed(0)
        self.method = build(name).to(device).train()
        if channels_last:
            self.method.to(memory_format=torch.channels_last)  # pyrefly: ignore
        self.views = self.method.views()
        side = max(view.size for view in self.views) * 8 // 7
        self.images = torch.randint(256, (batch, 3, side, side), dtype=torch.uint8, device=device)
        self.index = torch.arange(batch, device=device)
        self.optimizer = torch.optim.SGD(
            [p for p in self.method.parameters() if p.requires_grad], lr=1e-4, momentum=0.9
        )
        self.autocast = partial(torch.autocast, torch.device(device).type, DTYPES[precision], precision != "float32")
        self.step = 0

    def cut(self) -> Batch:
        views = [apply_batch(view, self.images, 0, self.step, self.index, i) for i, view in enumerate(self.views)]
        return Batch(tuple(views), self.index, self.index)

    def backward(self, batch: Batch) -> None:
        with self.autocast():
            loss = self.method(batch, Clock(self.step, 1000, 1000))["loss"]
        loss.backward()

    def __call__(self) -> None:
        self.backward(self.cut())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.method.after_step(Clock(self.step, 1000, 1000))

    def operations(self) -> int:
        """Of one forward and backward pass."""
        with FlopCounterMode(display=False) as counter:
            self.backward(self.cut())
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=["mae", "simclr", "moco", "dino"])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--matrix", type=int, default=8192, help="side of the matrices that are multiplied")
    parser.add_argument("--channels_last", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()

    rate = matrix_rate(options.device, DTYPES[options.precision], options.matrix)
    print(f"a product of matrices of side {options.matrix}: {rate / 1e12:.2f} TFLOP/s")
    rows = {}
    for name in options.methods:
        if options.device != "cpu":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        training = Training(name, options.batch, options.device, options.precision, options.channels_last)
        operations = training.operations()
        seconds = take_turns({name: training}, options.repetitions, options.device)
        row = table(seconds, options.batch, "images")[name]
        row = {"images per s": row["images per s"]}
        row["share of the matrix rate (%)"] = round(100 * operations * row["images per s"] / options.batch / rate, 1)
        if options.device != "cpu":
            row["peak memory (GB)"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        print(f"  {row}")
        rows[name] = row
        del training
    if options.save:
        device = torch.cuda.get_device_name() if options.device != "cpu" else "cpu"
        settings = {**vars(options), "device": device, "TFLOP/s of a matrix product": round(rate / 1e12, 2)}
        print(results.save("benchmark_throughput", rows, settings=settings))


if __name__ == "__main__":
    main()
