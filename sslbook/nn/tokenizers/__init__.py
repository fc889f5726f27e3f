"""Visual tokenizers: networks that assign to every patch of an image one of a fixed number of codes.

One kind a file: the discrete variational autoencoder and the vector-quantized transformer. `Tokenizer` is a trained one,
frozen, whose codes BEiT, BEiT v2 and CAE predict.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook.data.views import View
from sslbook.nn.frozen import Frozen, Normalization
from sslbook.nn.precision import full_precision
from sslbook.nn.tokenizers.discrete_vae import DiscreteDecoder, DiscreteEncoder
from sslbook.nn.tokenizers.vq import VQTokenizer

__all__ = ["DiscreteDecoder", "DiscreteEncoder", "Tokenizer", "VQTokenizer"]


class Tokenizer(Frozen):
    """A trained tokenizer, frozen, for a student's images: they are resized so that each patch has one code.

    Args:
        encoder: a module with `patch_size`, `num_codes` and `tokens(images)`.
        view: how the student's images are normalized.
        rows: patches of the student along a side.
        normalization: mean and standard deviation that the encoder wants; those of the view if left out.
    """

    def __init__(self, encoder: nn.Module, view: View, rows: int, normalization: Normalization | None = None) -> None:
        super().__init__(view, normalization, size=rows * int(encoder.patch_size))  # pyrefly: ignore
        self.encoder = encoder.requires_grad_(False)
        self.num_codes = int(encoder.num_codes)  # pyrefly: ignore
        self.train(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, "batch patches"]:
        """The code of every patch, row by row; in float32, so that mixed precision changes none."""
        with full_precision(images):
            return self.encoder.tokens(self.own_images(images.float()))  # pyrefly: ignore[not-callable]
