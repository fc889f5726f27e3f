"""Numbers with bounds, for signatures of constructors: the command line refuses what lies beyond.

>>> def __init__(self, num_heads: PositiveInt, temperature: PositiveFloat = 0.1) -> None: ...

From Python they are plain `int` and `float`.
"""

from dataclasses import dataclass
from math import inf
from typing import Annotated


@dataclass(frozen=True)
class Above:
    """Metadata of an annotation: values must be greater than `bound`, and less than `below`."""

    bound: float
    below: float = inf


PositiveInt = Annotated[int, Above(0)]
PositiveFloat = Annotated[float, Above(0)]
Fraction = Annotated[float, Above(0, below=1)]
