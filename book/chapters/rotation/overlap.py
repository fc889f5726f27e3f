"""The exact limits of rotation prediction for tilted shapes, in closed form."""

import math


def _overlap(half_width: float, folds: int = 1) -> tuple[float, float]:
    """Best accuracy (a fraction) and smallest loss for a shape of `folds`-fold symmetry, orientation uniform."""
    if half_width <= 0:
        return 1.0, 0.0
    reach = 2 * half_width * folds / 90  # how many claims an angle meets on average, over the four classes
    turns, rest = divmod(reach, 4)  # every class winds around the circle so many times, and covers a part once more
    more = rest - math.floor(rest)
    best = loss = 0.0
    for share, extra in ((more, math.floor(rest) + 1), (1 - more, math.floor(rest))):
        claims = [turns + 1] * extra + [turns] * (4 - extra)
        best += share * max(claims) / reach
        loss -= share * sum(c * math.log(c / sum(claims)) for c in claims if c > 0) / reach
    return best, loss


def best_accuracy(half_width: float, folds: int = 1) -> float:
    """The best accuracy (a fraction) at naming the rotation of a shape whose orientation is uniform on +- half_width.

    Args:
        half_width: in degrees, up to 180.
        folds: the shape looks the same after a turn by 360 / folds degrees.
    """
    return _overlap(half_width, folds)[0]


def smallest_loss(half_width: float, folds: int = 1) -> float:
    """The entropy, in nats, that remains of the rotation when the shape's angle is known exactly."""
    return _overlap(half_width, folds)[1]
