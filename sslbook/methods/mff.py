"""MFF: MAE whose decoder is also given what the shallow layers know.

An encoder trained on pixels wastes its last layers on keeping low-level detail for the decoder. Multi-level feature
fusion hands the detail over from shallow layers instead: their outputs, each through a linear layer, are averaged with
the last layer's, with learned weights. After training the maps are dropped, and the encoder is a plain transformer.

Liu, Zhang, Chen, Yu, Chen and Lin, 2023, "Improving pixel-based MIM by reducing wasted modeling capability"
(arXiv:2308.00261), section 3: linear projections and weighted average pooling (equations 2 and 3). All else is MAE (He
et al., 2022, arXiv:2111.06377). The weights are a softmax, as in the authors' code; the fused tokens pass the encoder's
last norm; images are cropped as by MAE, where the authors' are resized and shifted as by PixMIM. Masks are keyed by
image and epoch.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.data.views import MAE_CROP, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn.decoders import (
    PixelDecoder,
    normalize_patches,
    num_visible,
    patchify,
    random_mask,
    require_transformer,
    take,
)
from sslbook.nn.vit import VisionTransformer, init_transformer, patch_grid
from sslbook.schedules import Clock


class Fusion(nn.Module):
    """Averages several layers' tokens, all but the last through a linear layer of their own (equations 2 and 3)."""

    def __init__(self, dim: int, num_shallow: int) -> None:
        super().__init__()
        self.maps = nn.ModuleList([nn.Linear(dim, dim) for _ in range(num_shallow)])
        self.weights = nn.Parameter(torch.zeros(num_shallow + 1))
        init_transformer(self)

    def forward(self, layers: list[Float[Tensor, "batch tokens dim"]]) -> Float[Tensor, "batch tokens dim"]:
        """From the tokens of the shallow layers, in order, and of the last."""
        mapped = [part(tokens) for part, tokens in zip(self.maps, layers[:-1], strict=True)]
        share = self.weights.softmax(dim=0)
        return (torch.stack([*mapped, layers[-1]], dim=-1) * share).sum(dim=-1)


class MFF(Method):
    """Masked autoencoder with multi-level feature fusion (arXiv:2308.00261).

    Args:
        backbone: the vision transformer to train.
        view: what an image becomes.
        layers: the shallow blocks that are fused with the last one, counted from 0; the defaults are for 12 blocks.
        mask_ratio: part of the patches that is hidden.
        norm_pix_loss: predict every patch normalized by its own mean and deviation.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        view: View = MAE_CROP,
        layers: tuple[int, ...] = (0, 2, 4, 6, 8),
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
    ) -> None:
        super().__init__()
        backbone = require_transformer(backbone, "MFF")
        last = len(backbone.blocks) - 1
        if sorted(set(layers)) != list(layers) or not layers or not 0 <= layers[0] <= layers[-1] < last:
            raise UserError(
                f"layers {list(layers)} cannot be fused with block {last}, the last: "
                f"give increasing numbers from 0 to {last - 1}, such as {list(range(0, last, 2))}"
            )
        self.view, self.mask_ratio, self.norm_pix_loss, self.layers = view, mask_ratio, norm_pix_loss, tuple(layers)
        grid = patch_grid(view.size, view.size, backbone.patch_size)
        num_visible(grid[0] * grid[1], mask_ratio)  # refuses a ratio that leaves nothing to do
        self.backbone = backbone
        self.fusion = Fusion(backbone.dim, len(layers))
        self.decoder = PixelDecoder(backbone, view.size, decoder_dim, decoder_depth, decoder_num_heads)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def encode(self, tokens: Float[Tensor, "batch some dim"]) -> Float[Tensor, "batch 1+some dim"]:
        """The visible tokens after the fusion of all chosen layers."""
        outputs = list(self.backbone.layers(tokens))
        return self.backbone.norm(self.fusion([outputs[i] for i in self.layers] + outputs[-1:]))

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        tokens = self.backbone.embed(images)
        visible, hidden = random_mask(batch.index, tokens.shape[1], self.mask_ratio, clock)
        prediction = self.decoder(self.encode(take(tokens, visible)), visible, hidden, self.decoder.grid).float()
        target = take(patchify(images, self.backbone.patch_size), hidden).float()
        if self.norm_pix_loss:
            target = normalize_patches(target)
        loss = (prediction - target).square().mean()
        return {"loss": loss, "last_layer": self.fusion.weights.detach().softmax(dim=0)[-1]}
