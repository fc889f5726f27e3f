"""MixMIM: put the visible patches of one image into the holes of another, and draw what each of them hides.

A mask token tells the encoder nothing, and at evaluation there is none. Here the hidden half of an image's patches is
filled with those of a partner, whose missing patches are just the others: the encoder sees whole sequences, all of
them images. So that neither helps or disturbs the other, attention stays within the patches of one image. The
decoder takes the two apart again and draws the hidden half of each.

Liu, Huang, Zheng, Liu and Li, 2023, "MixMAE: Mixed and masked autoencoder for efficient pretraining of hierarchical
vision transformers" (arXiv:2205.13137, at first called MixMIM), section 3: mixing (eq. 1), masked attention, dual
reconstruction (eq. 2). What differs: the encoder is a plain vision transformer, whose class token is there twice, once
for either image, since a shared one would carry news from one to the other (the authors' is a Swin without class
token); what is hidden and drawn at once is one of its patches, a square of 32 pixels there. Every image has a mask of
its own instead of one for the batch. Partners are drawn by key: the authors turn the batch of a GPU around.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch
from sslbook.data.views import MAE_CROP, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn.patches import patchify
from sslbook.nn.vit import Block, VisionTransformer, init_transformer, patch_grid, resample_positions, sincos_positions
from sslbook.schedules import Clock


def partners(index: Int[Tensor, "images"], groups: int, clock: Clock) -> Int[Tensor, "images"]:
    """Whose patches fill the holes of each: within its group an image's partner is drawn, and partners mutually.

    The group is brought into a random order that depends on its images alone, and turned around; of an odd number one
    is its own partner, which hides as much.
    """
    order = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD + 1, 1)[:, 0]
    order = order.view(groups, -1).argsort(dim=1, stable=True)
    found = torch.empty_like(order).scatter(1, order, order.flip(1))
    return (found + torch.arange(groups, device=index.device)[:, None] * order.shape[1]).flatten()


def partner_mask(
    index: Int[Tensor, "batch"], num_patches: int, num_hidden: int, clock: Clock
) -> Bool[Tensor, "batch patches"]:
    """True where an image is hidden and its partner is seen."""
    order = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD, num_patches).argsort(dim=1, stable=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :num_hidden], True)


def apart(mask: Bool[Tensor, "batch patches"]) -> Float[Tensor, "batch 1 tokens tokens"]:
    """What is added to attention so that it stays within an image: two class tokens come first, one for each."""
    ours = mask.new_tensor([False, True]).expand(len(mask), -1)
    owner = torch.cat([ours, mask], dim=1)
    other = owner[:, :, None] != owner[:, None, :]
    return torch.zeros(other.shape, device=mask.device).masked_fill(other, -torch.inf)[:, None]


def dual_loss(
    prediction: Float[Tensor, "2 batch patches values"],
    target: Float[Tensor, "2 batch patches values"],
    mask: Bool[Tensor, "batch patches"],
    normalize: bool,
) -> Float[Tensor, ""]:
    """Squared error of the first image where `mask` is true and of the second elsewhere (equation 2)."""
    first, second = (torch.where(mask[:, :, None], x[0].float(), x[1].float()) for x in (prediction, target))
    if normalize:
        variance, mean = torch.var_mean(second, dim=2, keepdim=True)
        second = (second - mean) / (variance + 1e-6).sqrt()
    return (first - second).square().mean()


class MixMIM(Method):
    """Mixed and masked image modeling (arXiv:2205.13137).

    Args:
        backbone: the vision transformer to train.
        view: what an image becomes.
        mask_ratio: part of an image's patches that its partner's replace.
        norm_pix_loss: predict every patch normalized by its own mean and deviation.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
        partner_groups: into how many parts the global batch falls within which partners are drawn. With 1 the
            processes must exchange their images; a multiple of their number saves that.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        view: View = MAE_CROP,
        mask_ratio: float = 0.5,
        norm_pix_loss: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        partner_groups: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, VisionTransformer) or backbone.rel_pos_bias is not None:
            raise UserError(
                f"MixMIM mixes the patches of a vision transformer and cannot use this {type(backbone).__name__}: "
                "choose sslbook.nn.VisionTransformer with positions sincos or learned, or vit_tiny, vit_base, ..."
            )
        self.view, self.mask_ratio, self.norm_pix_loss = view, mask_ratio, norm_pix_loss
        self.partner_groups = partner_groups
        self.backbone = backbone
        self.grid = patch_grid(view.size, view.size, backbone.patch_size)
        self.num_hidden(self.grid[0] * self.grid[1])  # refuses a ratio that leaves nothing to do
        self.decoder_embed = nn.Linear(backbone.dim, decoder_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(decoder_dim))
        self.register_buffer("positions", sincos_positions(decoder_dim, *self.grid))
        self.decoder = nn.Sequential(*[Block(decoder_dim, decoder_num_heads) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.predict_pixels = nn.Linear(decoder_dim, backbone.patch_size**2 * 3)
        for part in (self.decoder_embed, self.decoder, self.predict_pixels):
            init_transformer(part)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def num_hidden(self, num_patches: int) -> int:
        """How many patches of an image its partner's replace; a `UserError` if that is none or all."""
        hidden = round(num_patches * self.mask_ratio)
        if not 0 < hidden < num_patches:
            raise UserError(
                f"mask ratio {self.mask_ratio} of {num_patches} patches leaves nothing to "
                f"{'see of one image' if hidden else 'predict'}: use a ratio near 0.5"
            )
        return hidden

    def partners(
        self, images: Float[Tensor, "batch 3 height width"], index: Int[Tensor, "batch"], clock: Clock
    ) -> Float[Tensor, "batch 3 height width"]:
        """For every image of this process its partner, which may be with another."""
        processes, groups = distributed.world_size(), self.partner_groups
        if (len(index) * processes) % groups:
            raise UserError(
                f"a batch of {len(index) * processes} does not fall into {groups} groups: change partner_groups"
            )
        if groups % processes == 0:
            return images[partners(index, groups // processes, clock)]
        found = partners(distributed.all_gather(index), groups, clock)
        own = slice(distributed.rank() * len(index), (distributed.rank() + 1) * len(index))
        return distributed.all_gather(images)[found[own]]

    def encode(
        self, mixed: Float[Tensor, "batch 3 height width"], mask: Bool[Tensor, "batch patches"]
    ) -> Float[Tensor, "batch tokens dim"]:
        """Both class tokens and all patches, encoded as if each image were alone."""
        backbone = self.backbone
        tokens = backbone.prepend_cls(backbone.embed(mixed))
        x, bias = torch.cat([tokens[:, :1], tokens], dim=1), apart(mask)
        for block in backbone.blocks:
            x = block(x, bias)
        return backbone.norm(x)

    def decode(
        self, encoded: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch patches"], grid: tuple[int, int]
    ) -> Float[Tensor, "2 batch patches values"]:
        """The drawings of each image and of its partner, each from its own visible patches and mask tokens."""
        x = self.decoder_embed(encoded)
        cls, patches = x[:, :2], x[:, 2:]
        token = self.mask_token.to(x.dtype)
        hidden = mask[:, :, None]
        both = torch.cat([torch.where(hidden, token, patches), torch.where(hidden, patches, token)])
        both = both + resample_positions(self.positions, self.grid, grid)
        x = self.decoder(torch.cat([torch.cat([cls[:, :1], cls[:, 1:]]), both], dim=1))
        return rearrange(self.predict_pixels(self.decoder_norm(x[:, 1:])), "(two b) n d -> two b n d", two=2)

    def predict(
        self,
        images: Float[Tensor, "batch 3 height width"],
        others: Float[Tensor, "batch 3 height width"],
        mask: Bool[Tensor, "batch patches"],
    ) -> Float[Tensor, "2 batch patches values"]:
        """What is drawn of the images and of their partners, from the mixture of both (equation 1)."""
        side = self.backbone.patch_size
        grid = (images.shape[2] // side, images.shape[3] // side)
        place = rearrange(mask, "b (h w) -> b 1 h w", h=grid[0])
        place = place.repeat_interleave(side, dim=2).repeat_interleave(side, dim=3)
        return self.decode(self.encode(torch.where(place, others, images), mask), mask, grid)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        others = self.partners(images, batch.index, clock)
        side = self.backbone.patch_size
        target = torch.stack([patchify(images, side), patchify(others, side)])
        num_patches = target.shape[2]
        mask = partner_mask(batch.index, num_patches, self.num_hidden(num_patches), clock)
        prediction = self.predict(images, others, mask)
        return {"loss": dual_loss(prediction, target, mask, self.norm_pix_loss)}
