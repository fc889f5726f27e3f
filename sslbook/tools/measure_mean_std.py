"""Mean and standard deviation of every channel of the training images: `python -m sslbook.tools measure_mean_std`."""

import torch
from tqdm.auto import tqdm

from sslbook.cli.common import cli, run
from sslbook.data.images import UnreadableImage
from sslbook.data.loader import Data
from sslbook.errors import UserError
from sslbook.types import PositiveInt


def measure_mean_std(data: Data, limit: PositiveInt = 5000, progress: bool = True) -> tuple[list[float], list[float]]:
    """Print `--data.mean` and `--data.std`: over all pixels of the training images, 8 and 16 bits scaled to 0..1.

    Args:
        data: the images; `--data.channels` says how many bands they have.
        limit: of more images than this, so many are measured, evenly spaced.
        progress: show a progress bar.

    Returns:
        What is printed: mean and standard deviation of each channel.

    Raises:
        UserError: no image is readable, or the images have other bands.
    """
    positions = torch.arange(data.num_train)
    positions = positions[:: max(1, -(-len(positions) // limit))]
    pixels, total, squares = 0, torch.zeros(()), torch.zeros(())
    for position in tqdm(positions.tolist(), unit="image", leave=False, disable=None if progress else True):
        try:
            x = data.values("pretrain", position)
        except UnreadableImage as error:
            data._note_unreadable(((error.name, error.reason),))
            continue
        x = x.double().flatten(1)
        pixels += x.shape[1]
        total, squares = total + x.sum(1), squares + x.square().sum(1)
    if not pixels:
        raise UserError(f"no readable image in {data.name}: check the folder and its files")
    mean = total / pixels
    std = (squares / pixels - mean.square()).clamp_min(0).sqrt()
    if bool((constant := std < 1e-12).any()):
        raise UserError(
            f"channel {int(constant.nonzero()[0])} is the same everywhere, so it cannot be normalized: leave it out"
        )
    found = [[float(f"{value:.5g}") for value in values.tolist()] for values in (mean, std)]
    print(f"--data.mean '{found[0]}' --data.std '{found[1]}'")
    return found[0], found[1]


def main(argv: list[str] | None = None) -> None:
    """`python -m sslbook.tools measure_mean_std --data.folder FOLDER --data.channels 5`."""
    cli(measure_mean_std, argv, prog="python -m sslbook.tools measure_mean_std")


if __name__ == "__main__":
    run(main)
