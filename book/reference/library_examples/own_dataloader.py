"""Your own DataLoader and augmentation, in our loop or in yours."""

import functools
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms import v2

import sslbook
from sslbook.data.loader import Batch
from sslbook.methods import VICReg
from sslbook.nn import ConvNet

augment = v2.Compose(
    [
        v2.RandomResizedCrop(16, (0.3, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.5] * 3),
    ]
)


class TwoViews(Dataset):
    """Two augmentations of every image, and its position."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        return augment(self.images[i]), augment(self.images[i]), i


class MyData(sslbook.Data):
    """Batches from a loader of one's own; all else stays as it is."""

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__(train=images)
        self.images = images

    def batches(self, views, batch_size, *, seed, epoch, **where) -> Iterator[Batch]:
        rank, processes = where.get("rank", 0), where.get("world_size", 1)
        images = TwoViews(self.images)
        order = DistributedSampler(images, processes, rank, seed=seed)
        order.set_epoch(epoch)
        own = batch_size // processes
        loader = DataLoader(images, own, sampler=order, drop_last=True)
        for number, (one, two, index) in enumerate(loader):
            if number >= where.get("start", 0):  # a resumed run is in mid-epoch
                yield Batch((one, two), index, torch.full_like(index, -1))


data = MyData(torch.randint(256, (64, 3, 24, 24), dtype=torch.uint8))
view = sslbook.View(size=16)  # what evaluation knows of the images
method = VICReg(ConvNet(8), view, view, hidden_dim=32, projector_dim=16)
adamw = functools.partial(torch.optim.AdamW, lr=1e-3)
run = sslbook.pretrain(method, data, adamw, batch_size=16, epochs=2, device="cpu")
print("steps", run.clock.step, "loss", round(run.metrics["loss"], 2))
