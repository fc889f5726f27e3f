"""Views per second at 32 pixels: the batched executor against torchvision, image by image."""

import argparse

import torch
from timing import table, take_turns
from torchvision.transforms import v2

from sslbook import results
from sslbook.data.executors import apply_batch
from sslbook.data.views import View


def torchvision_view(view: View, tensor: bool) -> v2.Compose:
    """The same view as people write it with torchvision."""
    to_image = [] if tensor else [v2.ToImage()]
    return v2.Compose(
        [
            v2.RandomResizedCrop(view.size, view.crop, view.ratio, v2.InterpolationMode(view.interpolation)),
            v2.RandomHorizontalFlip(view.flip),
            v2.RandomApply([v2.ColorJitter(*view.color_jitter)], view.color_jitter_p),
            v2.RandomGrayscale(view.grayscale),
            *to_image,
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(view.mean, view.std),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()

    view = View(size=32, color_jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (options.batch, 3, 32, 32), dtype=torch.uint8, generator=generator)
    on_device = images.to(options.device)
    index = torch.arange(options.batch)
    pil_images = [v2.functional.to_pil_image(image) for image in images]
    on_tensors, on_pil = torchvision_view(view, True), torchvision_view(view, False)
    epoch = iter(range(10**9))
    seconds = take_turns(
        {
            "sslbook, batched": lambda: apply_batch(view, on_device, 0, next(epoch), index, 0),
            "torchvision v2, each PIL image": lambda: torch.stack([on_pil(image) for image in pil_images]),
            "torchvision v2, each tensor": lambda: torch.stack([on_tensors(image) for image in images]),
        },
        options.repetitions,
        options.device,
    )
    print(f"{options.batch} images, {torch.get_num_threads()} threads, {options.device}")
    rows = table(seconds, options.batch, "views")
    if options.save:
        settings = {**vars(options), "threads": torch.get_num_threads()}
        print(results.save("benchmark_views", rows, settings=settings))


if __name__ == "__main__":
    main()
