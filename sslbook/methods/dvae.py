"""Discrete VAE: learn a codebook with which an image is a grid of codes, the targets of BEiT and CAE.

An encoder gives every patch a distribution over the codes, and a decoder reconstructs the image from sampled codes. A
sample has no gradient, so training decodes a mixture of codes instead, perturbed by Gumbel noise, which approaches a
sample of one code as the temperature falls.

Ramesh et al., 2021, "Zero-shot text-to-image generation" (DALL-E, arXiv:2102.12092), section 2.1, with the relaxation
of Jang, Gu and Poole, 2017, "Categorical reparameterization with Gumbel-softmax" (arXiv:1611.01144), equation 2.

What differs from the paper:
- The likelihood of the pixels is normal (squared error) instead of logit-Laplace, which sets another scale for the
  weight of the KL divergence (6.6 there).
- Networks are smaller, and the temperature falls over the whole run.
- The noise is counter-based random numbers of seed, epoch and image.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch
from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn.tokenizers import DiscreteDecoder, DiscreteEncoder
from sslbook.nn.vit import patch_grid
from sslbook.schedules import Clock, Cosine
from sslbook.types import PositiveFloat

VIEW = View(size=256, crop=(0.25, 1.0), interpolation="bicubic")
STREAM = rng.METHOD + 900  # the row of random numbers of the Gumbel noise


def gumbel_noise(
    index: Int[Tensor, "batch"], num_patches: int, num_codes: int, clock: Clock
) -> Float[Tensor, "batch {num_patches} {num_codes}"]:
    """Gumbel noise: the code of the greatest logit plus noise is a sample from the softmax of the logits."""
    # Uniform numbers may be 0, which would give infinity, but never 1.
    u = rng.uniform(clock.seed, clock.epoch, index, STREAM, num_patches * num_codes).clamp_min(2.0**-25)
    return -(-u.log()).log().unflatten(1, (num_patches, num_codes))


def gumbel_softmax(
    logits: Float[Tensor, "batch patches codes"], noise: Float[Tensor, "batch patches codes"], temperature: float
) -> Float[Tensor, "batch patches codes"]:
    """The relaxed sample, weights of all codes (arXiv:1611.01144, equation 2); one-hot at temperature 0."""
    return ((logits + noise) / temperature).softmax(dim=2)


def kl_to_uniform(logits: Float[Tensor, "batch patches codes"]) -> Float[Tensor, ""]:
    """KL divergence of the codes' distribution from the uniform prior, log K - entropy: the mean over patches."""
    log_q = logits.log_softmax(dim=2)
    return (log_q.exp() * log_q).sum(dim=2).mean() + math.log(logits.shape[2])


def perplexity(tokens: Int[Tensor, "batch patches"], num_codes: int) -> Float[Tensor, ""]:
    """Exponential of the entropy of the codes' frequencies over all processes: the effective number of codes in use."""
    counts = distributed.all_reduce_sum(tokens.flatten().bincount(minlength=num_codes).float())
    return torch.special.entr(counts / counts.sum()).sum().exp()


class DVAE(Method):
    """Discrete variational autoencoder (arXiv:2102.12092).

    Args:
        backbone: the encoder to train, a sslbook.nn.DiscreteEncoder.
        view: augmentation of an image.
        kl_weight: weight of the KL divergence of the codes from the uniform distribution.
        temperature: of the relaxed samples, at the beginning.
        last_temperature: of the relaxed samples, at the end; it falls along half a cosine.

    Raises:
        UserError: the backbone is no discrete encoder, or the images do not divide into patches.
    """

    rgb_only = True

    backbone: DiscreteEncoder  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        view: View = VIEW,
        kl_weight: float = 0.001,
        temperature: PositiveFloat = 1.0,
        last_temperature: PositiveFloat = 1 / 16,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, DiscreteEncoder):
            raise UserError(
                f"a discrete VAE trains an encoder of codes and cannot use a {type(backbone).__name__}: "
                "choose sslbook.nn.DiscreteEncoder"
            )
        patch_grid(view.size, view.size, backbone.patch_size)  # rejects a size that does not divide
        self.view, self.kl_weight = view, kl_weight
        self.temperature = Cosine(temperature, last_temperature)
        self.backbone = backbone
        self.decoder = DiscreteDecoder(**backbone.init_args)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        logits = self.backbone.logits(images).float()  # q(z | x): (n, patches, codes)
        noise = gumbel_noise(batch.index, logits.shape[1], logits.shape[2], clock)
        relaxed = gumbel_softmax(logits, noise, self.temperature(clock))  # differentiable, unlike a sampled code
        reconstruction = self.decoder(relaxed, images.shape[2] // self.backbone.patch_size)  # (n, 3, h, w)
        # The evidence lower bound (equation 1), negated, with a weight for its second term.
        squared_error = (reconstruction.float() - images.float()).square().mean()
        return {
            "loss": squared_error + self.kl_weight * kl_to_uniform(logits),
            "squared_error": squared_error.detach(),
            "code_perplexity": perplexity(logits.argmax(dim=2), self.backbone.num_codes),
        }
