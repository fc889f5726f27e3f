"""MixMIM: fill the masked patches of one image with those of another, and reconstruct both images.

A mask token carries no information, and there is none at evaluation. Here the masked half of an image's patches is
replaced by the patches of another image that are masked complementarily, so that the encoder sees whole sequences of
real patches. Attention stays within the patches of one image, and the decoder reconstructs the masked half of each.

Liu, Huang, Zheng, Liu and Li, 2023, "MixMAE: Mixed and masked autoencoder for efficient pretraining of hierarchical
vision transformers" (arXiv:2205.13137, at first called MixMIM), section 3: mixing (equation 1), masked attention, dual
reconstruction (equation 2).

What differs from the authors' code (Sense-X/MixMIM, 9da3eee):
- The encoder is a plain vision transformer; theirs is a Swin without class token. Our class token is there twice, once
  for each image, since a shared one would carry information from one to the other.
- A mask covers single patches of this encoder; theirs covers squares of 32 pixels.
- Every image has its own mask; they have one for the batch.
- Pairs of images and masks are counter-based random numbers of seed, epoch and image; they mix the batch of a GPU with
  itself in reverse order, and their masks come from torch's generator.
"""

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch
from sslbook.data.masks import require_mask, uniform_mask
from sslbook.data.views import MAE_CROP, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn.backbones import in_channels
from sslbook.nn.patches import normalize_patches, patchify
from sslbook.nn.vit import Block, VisionTransformer, init_transformer, patch_grid, require_transformer, sincos_positions
from sslbook.schedules import Clock
from sslbook.types import PositiveInt


def other_images(index: Int[Tensor, "images"], num_groups: int, clock: Clock) -> Int[Tensor, "images"]:
    """For every image the row of the other image it is mixed with: random pairs within each of `num_groups` groups.

    The images of a group are sorted by a random number of their own, and the first is paired with the last, and so on.
    The middle one of an odd number is mixed with itself, which masks as much.
    """
    order = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD + 1, 1)[:, 0]
    order = order.view(num_groups, -1).argsort(dim=1, stable=True)
    other = torch.empty_like(order).scatter(1, order, order.flip(1))
    return (other + torch.arange(num_groups, device=index.device)[:, None] * order.shape[1]).flatten()


def attention_bias(mask: Bool[Tensor, "batch patches"]) -> Float[Tensor, "batch 1 tokens tokens"]:
    """0 between tokens of the same image and -inf between the two images; both class tokens come first."""
    cls = mask.new_tensor([False, True]).expand(len(mask), -1)
    is_other = torch.cat([cls, mask], dim=1)  # False: a token of the image, True: of the other one
    different = is_other[:, :, None] != is_other[:, None, :]
    return torch.zeros(different.shape, device=mask.device).masked_fill(different, -torch.inf)[:, None]


def dual_loss(
    prediction: Float[Tensor, "2 batch patches values"],
    target: Float[Tensor, "2 batch patches values"],
    mask: Bool[Tensor, "batch patches"],
    normalize: bool,
) -> Float[Tensor, ""]:
    """Mean squared error over the masked patches of both images (equation 2): of the first where `mask` is true."""
    prediction, target = (torch.where(mask[:, :, None], x[0].float(), x[1].float()) for x in (prediction, target))
    return (prediction - (normalize_patches(target) if normalize else target)).square().mean()


class MixMIM(Method):
    """Mixed and masked image modeling (arXiv:2205.13137).

    Args:
        backbone: the vision transformer to train.
        view: augmentation of an image.
        mask_ratio: fraction of an image's patches that is replaced by those of the other image.
        norm_pix_loss: whether the target is every patch normalized by its own mean and standard deviation.
        decoder_dim: width of the decoder.
        decoder_depth: number of blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
        num_mix_groups: number of groups of the global batch within which images are paired. With 1 the processes
            exchange their images; a multiple of the number of processes avoids that.

    Raises:
        UserError: the backbone is no `VisionTransformer` with absolute positions, its patches do not fit the view, or
            the mask ratio masks no patch or all of them.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]
    positions: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        view: View = MAE_CROP,
        mask_ratio: float = 0.5,
        norm_pix_loss: bool = True,
        decoder_dim: PositiveInt = 512,
        decoder_depth: int = 8,
        decoder_num_heads: PositiveInt = 16,
        num_mix_groups: PositiveInt = 1,
    ) -> None:
        super().__init__()
        backbone = require_transformer(backbone, "MixMIM", drops_patches=True)
        self.view, self.norm_pix_loss, self.num_mix_groups = view, norm_pix_loss, num_mix_groups
        self.backbone = backbone
        self.grid = patch_grid(view.size, view.size, backbone.patch_size)
        num_patches = self.grid[0] * self.grid[1]
        self.num_masked = require_mask(round(num_patches * mask_ratio), num_patches)
        self.decoder_embed = nn.Linear(backbone.dim, decoder_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, decoder_dim))
        self.register_buffer("positions", sincos_positions(decoder_dim, *self.grid))
        self.decoder = nn.Sequential(*[Block(decoder_dim, decoder_num_heads) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.predict_pixels = nn.Linear(decoder_dim, backbone.patch_size**2 * in_channels(backbone))
        for part in (self.decoder_embed, self.decoder, self.predict_pixels):
            init_transformer(part)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def others(
        self, images: Float[Tensor, "batch channels height width"], index: Int[Tensor, "batch"], clock: Clock
    ) -> Float[Tensor, "batch channels height width"]:
        """The other image for every image of this process, possibly from another process.

        Raises:
            UserError: the global batch cannot be divided into groups.
        """
        processes, groups = distributed.world_size(), self.num_mix_groups
        if (len(index) * processes) % groups:
            raise UserError(
                f"a batch of {len(index) * processes} cannot be divided into {groups} groups: change num_mix_groups"
            )
        if groups % processes == 0:
            return images[other_images(index, groups // processes, clock)]
        rows = other_images(distributed.all_gather(index), groups, clock)
        return distributed.all_gather(images)[rows[distributed.own_rows(len(index), index.device)]]

    def encode(
        self, mixed: Float[Tensor, "batch channels height width"], mask: Bool[Tensor, "batch patches"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Both class tokens and all patches, encoded as if each image were alone (masked self-attention)."""
        backbone = self.backbone
        tokens = backbone.prepend_cls(backbone.embed(mixed))
        x, bias = torch.cat([tokens[:, :1], tokens], dim=1), attention_bias(mask)  # (batch, 2 + patches, dim)
        for block in backbone.blocks:
            x = block(x, bias)
        return backbone.norm(x)

    def decode(
        self, encoded: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch patches"]
    ) -> Float[Tensor, "2 batch patches values"]:
        """The reconstructions of each image and of the other, each from its own visible patches and mask tokens."""
        x = self.decoder_embed(encoded)
        cls, patches = x[:, :2], x[:, 2:]
        token, replaced = self.mask_token.to(x.dtype), mask[:, :, None]
        # Unmix: every sequence keeps its own tokens, and mask tokens replace those of the other image.
        both = torch.cat([torch.where(replaced, token, patches), torch.where(replaced, patches, token)])
        both = both + self.positions  # (2 batch, patches, dim)
        x = self.decoder(torch.cat([torch.cat([cls[:, :1], cls[:, 1:]]), both], dim=1))
        return rearrange(self.predict_pixels(self.decoder_norm(x[:, 1:])), "(two b) n d -> two b n d", two=2)

    def predict(
        self,
        images: Float[Tensor, "batch channels height width"],
        others: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch patches"],
    ) -> Float[Tensor, "2 batch patches values"]:
        """The reconstructions of the images and of the others, from the mixture of both."""
        side = self.backbone.patch_size
        pixels = repeat(mask, "b (h w) -> b 1 (h p) (w q)", h=self.grid[0], p=side, q=side)
        mixed = torch.where(pixels, others, images)  # equation 1
        return self.decode(self.encode(mixed, mask), mask)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        others = self.others(images, batch.index, clock)
        side = self.backbone.patch_size
        target = torch.stack([patchify(images, side), patchify(others, side)])  # (2, batch, patches, values)
        mask = uniform_mask(batch.index, target.shape[2], self.num_masked, clock)  # true: from the other image
        prediction = self.predict(images, others, mask)  # dual reconstruction: of both images from one encoder pass
        return {"loss": dual_loss(prediction, target, mask, self.norm_pix_loss)}
