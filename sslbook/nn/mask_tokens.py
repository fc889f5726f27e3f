"""Selecting tokens: which patches an encoder sees, and which are predicted."""

from jaxtyping import Float, Int
from torch import Tensor


def gather_tokens(
    tokens: Float[Tensor, "batch tokens dim"], index: Int[Tensor, "batch some"]
) -> Float[Tensor, "batch some dim"]:
    """The tokens at the given positions, image by image."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))
