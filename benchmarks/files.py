"""Images per second from a folder of files: ours against torchvision's ImageFolder, its transforms and torch's loader.

Two views of every image, as SimCLR wants them, without loader processes on either side: what is compared is the CPU
time that an image costs, whatever else the machine does.
"""

import argparse
import itertools
import time
from pathlib import Path

import torch
from timing import table, take_turns
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2
from views import torchvision_view

from sslbook import results
from sslbook.data.loader import Data
from sslbook.data.views import View


class TwoViews(Dataset):
    """Each image twice, augmented independently."""

    def __init__(self, folder: Path, transform: v2.Compose) -> None:
        self.images, self.transform = ImageFolder(folder), transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, position: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[position][0]
        return self.transform(image), self.transform(image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of images, a folder a class")
    parser.add_argument("--size", type=int, default=224, help="of a view, in pixels")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=2, help="in each repetition")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument(
        "--save", metavar="NAME", help="write book/results/benchmark_files_NAME.json: 32, 224 or camera"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)

    view = View(size=options.size, color_jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2)
    data = Data(folder=str(options.folder), workers=0)
    loader = DataLoader(TwoViews(options.folder, torchvision_view(view, False)), options.batch, shuffle=True)
    epoch = iter(range(10**9))

    def ours() -> list:
        return list(data.batches((view, view), options.batch, seed=0, epoch=next(epoch), stop=options.batches))

    seconds = take_turns(
        {"sslbook": ours, "torchvision": lambda: list(itertools.islice(loader, options.batches))},
        options.repetitions,
        clock=time.process_time,
    )
    count = options.batch * options.batches
    print(f"{count} images of {data.name}, two views of {options.size} pixels, one thread, CPU time")
    rows = table(seconds, count, "images")
    if options.save:
        settings = {**vars(options), "folder": options.folder.name, "threads": 1}
        print(results.save(f"benchmark_files_{options.save}", rows, settings=settings))


if __name__ == "__main__":
    main()
