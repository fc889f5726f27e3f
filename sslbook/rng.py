"""Counter-based random numbers.

A random number is a pure function of a key `(seed, epoch, index, stream)` and of its position in a row. The augmentation
of an image therefore depends on the image and the epoch alone, never on the worker, the process, the batch or a restart,
and no random state has to be saved. The generator is a counter hashed by the finalizer of SplitMix64 (Steele, Lea and
Flood, 2014, "Fast splittable pseudorandom number generators"), in 64-bit integer arithmetic that overflows alike on
every device.

>>> uniform(seed=0, epoch=3, index=torch.tensor([7, 8]), stream=0, count=2).shape
torch.Size([2, 2])
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

# Constants of SplitMix64, as signed integers. _GOLDEN is 2^64 / golden ratio: multiples of it are far apart.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)

# Streams: independent rows for one key. Views use 0, 1, 2, ... in their order, what a method samples inside `forward`
# (masks, rotations) starts at METHOD, and the order of the images in an epoch has its own.
METHOD = 1000
ORDER = 2000


def _mix(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """SplitMix64's finalizer: every input bit reaches every output bit."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _shift_right(x: Int[Tensor, "..."], bits: int) -> Int[Tensor, "..."]:
    """Logical shift: torch's `>>` repeats the sign bit, so the bits that it inserts are cleared."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(
    seed: int, epoch: int, index: Int[Tensor, "batch"], stream: int, count: int
) -> Float[Tensor, "batch {count}"]:
    """`count` numbers, uniform in [0, 1), for every entry of `index`; float32, on the device of `index`."""
    key = torch.tensor(seed, dtype=torch.int64, device=index.device)
    for part in (epoch, index.to(torch.int64), stream):
        key = _mix(key * _GOLDEN + _GOLDEN + part)
    counter = torch.arange(1, count + 1, device=index.device)
    bits = _mix(key[:, None] + counter * _GOLDEN)
    return _shift_right(bits, 40).float() * 2.0**-24  # the top 24 bits: all that a float32 in [0, 1) can hold


def permutation(seed: int, epoch: int, size: int) -> Int[Tensor, "{size}"]:
    """A random order of `range(size)` that depends on `(seed, epoch)` alone."""
    index = torch.arange(size)
    key = torch.tensor([seed, epoch, ORDER])
    bits = _mix(_mix(_mix(key[0] * _GOLDEN + key[1]) * _GOLDEN + key[2]) + (index + 1) * _GOLDEN)
    return bits.argsort(stable=True)
