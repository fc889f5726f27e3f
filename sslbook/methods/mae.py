"""MAE: reconstruct the pixels of masked patches with an encoder that sees the visible patches only.

Three quarters of an image's patches are masked. The encoder, a vision transformer, runs on the rest alone, which makes
it fast and keeps mask tokens out of the representation. A small decoder gets the encoded patches and mask tokens, each
with its position, and predicts the pixels of the masked patches.

He, Chen, Xie, Li, Dollár and Girshick, 2022, "Masked autoencoders are scalable vision learners" (arXiv:2111.06377),
section 3. Values, positions and initialization are those of the authors' code.

What differs from the authors' code (facebookresearch/mae, 6a2ba40):
- Masks are counter-based random numbers of seed, epoch and image; theirs come from torch's generator.
- The decoder's input stays in the shuffled order, each token with its position; theirs is first put back into the
  image's order, which gives the same result.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import rng
from sslbook.data.loader import Batch
from sslbook.data.masks import require_mask
from sslbook.data.views import MAE_CROP, View
from sslbook.methods.base import Method
from sslbook.nn.backbones import in_channels
from sslbook.nn.mask_tokens import gather_tokens
from sslbook.nn.patches import normalize_patches, patchify, unpatchify
from sslbook.nn.vit import Block, VisionTransformer, init_transformer, patch_grid, require_transformer, sincos_positions
from sslbook.schedules import Clock
from sslbook.types import PositiveInt


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """How many patches the encoder sees.

    Raises:
        UserError: none, or all of them.
    """
    visible = int(num_patches * (1 - mask_ratio) + 1e-6)  # a ratio of 0.9 masks 9 of 10, although 1 - 0.9 < 0.1
    return num_patches - require_mask(num_patches - visible, num_patches)


def random_mask(
    index: Int[Tensor, "batch"], num_patches: int, mask_ratio: float, clock: Clock
) -> tuple[Int[Tensor, "batch visible"], Int[Tensor, "batch masked"]]:
    """The positions of the visible and of the masked patches of every image, in random order.

    Section 3, "Simple implementation": shuffle the patches, keep the first ones. `index` are the images' numbers in the
    data set.
    """
    order = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD, num_patches).argsort(dim=1, stable=True)
    visible = num_visible(num_patches, mask_ratio)
    return order[:, :visible], order[:, visible:]


def reconstruction_loss(
    prediction: Float[Tensor, "batch masked values"], target: Float[Tensor, "batch masked values"]
) -> Float[Tensor, ""]:
    """Mean squared error over the masked patches (section 3, "Reconstruction target")."""
    return (prediction.float() - target.float()).square().mean()


class Decoder(nn.Module):
    """A narrow transformer that predicts the pixels of masked patches from the encoded visible ones."""

    positions: Tensor

    def __init__(
        self,
        encoder_dim: int,
        dim: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        grid: tuple[int, int],
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, *grid))
        self.blocks = nn.Sequential(*[Block(dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, patch_size**2 * channels)
        init_transformer(self)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens encoder_dim"],
        visible: Int[Tensor, "batch visible"],
        masked: Int[Tensor, "batch masked"],
    ) -> Float[Tensor, "batch masked values"]:
        tokens = self.embed(tokens)  # (batch, 1 + visible, dim): the class token comes first
        mask_tokens = self.mask_token.to(tokens.dtype).expand(len(tokens), masked.shape[1], -1)
        # One shared vector for every masked patch: its position determines which patch is predicted ("MAE decoder").
        positions = self.positions[torch.cat([visible, masked], dim=1)]
        patches = torch.cat([tokens[:, 1:], mask_tokens], dim=1) + positions  # (batch, patches, dim)
        tokens = self.blocks(torch.cat([tokens[:, :1], patches], dim=1))
        return self.predict(self.norm(tokens[:, -masked.shape[1] :]))  # the masked patches come last


class MAE(Method):
    """Masked autoencoder (arXiv:2111.06377).

    Args:
        backbone: the vision transformer to train.
        view: augmentation of an image.
        mask_ratio: fraction of the patches that is masked.
        norm_pix_loss: whether the target is every patch normalized by its own mean and standard deviation.
        decoder_dim: width of the decoder.
        decoder_depth: number of blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.

    Raises:
        UserError: the backbone is no `VisionTransformer`, its patches do not fit the view, or the mask ratio masks no
            patch or all of them.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        view: View = MAE_CROP,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        decoder_dim: PositiveInt = 512,
        decoder_depth: int = 8,
        decoder_num_heads: PositiveInt = 16,
    ) -> None:
        super().__init__()
        backbone = require_transformer(backbone, type(self).__name__, drops_patches=True)
        self.view, self.mask_ratio, self.norm_pix_loss = view, mask_ratio, norm_pix_loss
        size = backbone.patch_size
        self.grid = patch_grid(view.size, view.size, size)
        num_visible(self.grid[0] * self.grid[1], mask_ratio)  # raises if the ratio masks no patch or all
        self.backbone = backbone
        width, channels = (decoder_dim, decoder_depth, decoder_num_heads), in_channels(backbone)
        self.decoder = Decoder(backbone.dim, *width, size, self.grid, channels)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def encode(self, tokens: Float[Tensor, "batch visible dim"]) -> Float[Tensor, "batch 1+visible dim"]:
        """The class token and the visible patches after the encoder."""
        return self.backbone.encode(tokens)

    def predict(
        self, images: Float[Tensor, "batch channels height width"], index: Int[Tensor, "batch"], clock: Clock
    ) -> tuple[Float[Tensor, "batch masked values"], Int[Tensor, "batch masked"]]:
        """The decoder's prediction for the masked patches, and the positions of these."""
        tokens = self.backbone.embed(images)  # (batch, patches, dim): positions are added before patches are dropped
        visible, masked = random_mask(index, tokens.shape[1], self.mask_ratio, clock)
        encoded = self.encode(gather_tokens(tokens, visible))  # no mask tokens here ("MAE encoder")
        return self.decoder(encoded, visible, masked), masked

    def target(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch patches values"]:
        """The pixels of every patch, which the decoder is to predict."""
        return patchify(images, self.backbone.patch_size)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        prediction, masked = self.predict(images, batch.index, clock)  # (batch, masked, values)
        target = gather_tokens(self.target(images), masked)  # only masked patches enter the loss, as in BERT
        if self.norm_pix_loss:
            target = normalize_patches(target)  # contrast within the patch; its mean and scale need not be predicted
        return {"loss": reconstruction_loss(prediction, target)}

    @torch.no_grad()
    def reconstruct(
        self, images: Float[Tensor, "batch channels height width"], index: Int[Tensor, "batch"], clock: Clock = Clock()
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch channels height width"]]:
        """The images with their masked patches set to zero, and with these patches reconstructed.

        With `norm_pix_loss` a patch is predicted up to its mean and standard deviation, which are taken from the image.
        """
        size = self.backbone.patch_size
        prediction, masked = self.predict(images, index, clock)
        prediction, patches = prediction.to(images.dtype), patchify(images, size)
        if self.norm_pix_loss:
            variance, mean = torch.var_mean(gather_tokens(self.target(images), masked), dim=-1, keepdim=True)
            prediction = prediction * (variance + 1e-6).sqrt() + mean
        position = masked[:, :, None].expand_as(prediction)
        zeroed, reconstructed = (patches.scatter(1, position, x) for x in (torch.zeros_like(prediction), prediction))
        return unpatchify(zeroed, size, self.grid), unpatchify(reconstructed, size, self.grid)
