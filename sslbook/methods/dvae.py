"""Discrete VAE: learn a vocabulary in which an image is a grid of words, for BEiT and CAE to predict.

An encoder scores every code at every patch, a code is drawn from these scores, and a decoder draws the image from the
codes alone. Drawing has no gradient, so in training each patch gets a mixture of codes instead, disturbed by Gumbel
noise, which becomes a draw of a single code as the temperature falls (the relaxation of Jang, Gu and Poole, 2017,
"Categorical reparameterization with Gumbel-softmax", arXiv:1611.01144, equation 2).

Ramesh et al., 2021, "Zero-shot text-to-image generation" (arXiv:2102.12092), section 2.1. What differs: the images'
likelihood is normal (squared error) instead of logit-Laplace, which sets another scale for the weight of the divergence
(6.6 there); networks are smaller, and the temperature falls over the whole run. The noise is keyed by image and epoch.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed
from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn.tokenizers import (
    DiscreteDecoder,
    DiscreteEncoder,
    discrete_losses,
    falling_temperature,
    gumbel_noise,
)
from sslbook.nn.vit import patch_grid
from sslbook.schedules import Clock

VIEW = View(size=256, crop=(0.25, 1.0), interpolation="bicubic")


def perplexity(tokens: Int[Tensor, "batch patches"], num_codes: int) -> Float[Tensor, ""]:
    """How many codes are in use in all processes' batches: the exponential of the entropy of their frequencies."""
    counts = distributed.all_reduce_sum(tokens.flatten().bincount(minlength=num_codes).float())
    return torch.special.entr(counts / counts.sum()).sum().exp()


class DVAE(Method):
    """Discrete variational autoencoder (arXiv:2102.12092).

    Args:
        backbone: the encoder to train, a sslbook.nn.DiscreteEncoder.
        view: what an image becomes.
        kl_weight: how much the divergence of the codes from the uniform distribution counts.
        temperature: of the mixture of codes at first ...
        last_temperature: ... and in the end.
    """

    backbone: DiscreteEncoder  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        kl_weight: float = 0.001,
        temperature: float = 1.0,
        last_temperature: float = 1 / 16,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, DiscreteEncoder):
            raise UserError(
                f"a discrete autoencoder needs scores of codes and cannot use a {type(backbone).__name__}: "
                "choose sslbook.nn.DiscreteEncoder"
            )
        if not 0 < last_temperature <= temperature:
            raise UserError(
                f"the temperature cannot fall from {temperature} to {last_temperature}: use 1.0 and 0.0625, or another "
                "two positive numbers, the larger first"
            )
        patch_grid(view.size, view.size, backbone.patch_size)  # refuses a size that does not divide
        self.view, self.kl_weight = view, kl_weight
        self.temperature, self.last_temperature = temperature, last_temperature
        self.backbone = backbone
        self.decoder = DiscreteDecoder(**backbone.init_args)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        scores = self.backbone.scores(images).float()
        noise = gumbel_noise(batch.index, scores.shape[1], scores.shape[2], clock.seed, clock.epoch)
        temperature = falling_temperature(self.temperature, self.last_temperature, clock.progress)
        squared, divergence = discrete_losses(self.backbone, self.decoder, images, noise, temperature, scores)
        return {
            "loss": squared + self.kl_weight * divergence,
            "squared_error": squared.detach(),
            "codes_in_use": perplexity(scores.argmax(dim=2), self.backbone.num_codes),
        }
