"""MFF: MAE whose decoder also gets the tokens of shallow layers.

An encoder trained to predict pixels spends its last layers on low-level detail, which the decoder needs. Multi-level
feature fusion passes this detail on from shallow layers: their tokens, each through a linear layer, are averaged with
those of the last layer, with learned weights. After training these layers are dropped, and a plain transformer remains.

Liu, Zhang, Chen, Yu, Chen and Lin, 2023, "Improving pixel-based MIM by reducing wasted modeling capability"
(arXiv:2308.00261), section 3: linear projections and weighted average pooling (equations 2 and 3). All else is MAE (He
et al., 2022, arXiv:2111.06377). The weights are a softmax and the fused tokens pass the encoder's last norm, as in the
authors' code.

What differs from the authors' code (open-mmlab/mmpretrain, 1dfd446):
- Images are cropped as in MAE; theirs are resized and shifted as in PixMIM.
- Masks are counter-based random numbers of seed, epoch and image; theirs come from torch's generator.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.data.loader import Batch
from sslbook.errors import UserError
from sslbook.methods.mae import MAE
from sslbook.nn.vit import init_transformer, require_transformer
from sslbook.schedules import Clock


class Fusion(nn.Module):
    """A weighted average of several layers' tokens, all but the last through a linear layer (equations 2 and 3)."""

    def __init__(self, dim: int, num_shallow: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList([nn.Linear(dim, dim) for _ in range(num_shallow)])
        self.weights = nn.Parameter(torch.zeros(num_shallow + 1))
        init_transformer(self)

    def forward(self, layers: list[Float[Tensor, "batch tokens dim"]]) -> Float[Tensor, "batch tokens dim"]:
        """From the tokens of the shallow layers, in order, and of the last."""
        # Equation 2: a projection aligns shallow features with those of the last layer, which needs none.
        projected = [layer(tokens) for layer, tokens in zip(self.projections, layers[:-1], strict=True)]
        weights = self.weights.softmax(dim=0)  # w_i of equation 3; equal in the beginning
        return (torch.stack([*projected, layers[-1]], dim=-1) * weights).sum(dim=-1)


class MFF(MAE):
    """Masked autoencoder with multi-level feature fusion (arXiv:2308.00261).

    Args:
        backbone: the vision transformer to train.
        layers: the shallow blocks that are fused with the last one, counted from 0; the defaults are for 12 blocks.
        mae_options: the options of MAE.

    Raises:
        UserError: `layers` are not increasing numbers of blocks before the last; and what MAE raises.
    """

    def __init__(self, backbone: nn.Module, layers: tuple[int, ...] = (0, 2, 4, 6, 8), **mae_options: Any) -> None:
        net = require_transformer(backbone, "MFF")
        last = len(net.blocks) - 1
        if sorted(set(layers)) != list(layers) or not layers or not 0 <= layers[0] <= layers[-1] < last:
            raise UserError(
                f"layers {list(layers)} cannot be fused with block {last}, the last: "
                f"give increasing numbers from 0 to {last - 1}, such as {list(range(0, last, 2))}"
            )
        fusion = Fusion(net.dim, len(layers))
        super().__init__(backbone, **mae_options)
        self.layers, self.fusion = tuple(layers), fusion

    def encode(self, tokens: Float[Tensor, "batch visible dim"]) -> Float[Tensor, "batch 1+visible dim"]:
        """The visible tokens after the fusion of the chosen layers with the last one."""
        outputs = list(self.backbone.layers(tokens))
        return self.backbone.norm(self.fusion([outputs[i] for i in self.layers] + outputs[-1:]))

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        out = super().forward(batch, clock)  # MAE's step, with the tokens of `encode` above
        # Without fusion this weight would be 1. The smaller it is, the more the decoder relies on shallow layers.
        return out | {"last_layer_weight": self.fusion.weights.detach().softmax(dim=0)[-1]}
