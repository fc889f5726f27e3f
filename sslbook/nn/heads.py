"""Projection and prediction heads: the small networks between a backbone and a loss."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.nn.precision import full_precision


class MLP(nn.Sequential):
    """Linear layers with ReLU in between: the projector and predictor of most methods.

    A linear layer followed by batch norm has no bias, since batch norm subtracts it again.

    Args:
        in_dim: width of the input.
        hidden_dim: width of the hidden layers.
        out_dim: width of the output.
        num_layers: number of linear layers; with 1 there is no hidden layer.
        batch_norm: normalize every hidden layer.
        last_batch_norm: batch norm on the output: `none`; `plain` without learned scale and shift; `scale` with a
            learned scale and the shift fixed at zero; `affine` with both.
        last_bias: give the last linear layer a bias, unless batch norm follows.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        out_dim: int,
        num_layers: int = 2,
        batch_norm: bool = True,
        last_batch_norm: Literal["none", "plain", "scale", "affine"] = "none",
        last_bias: bool = True,
    ) -> None:
        dims = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
        modules: list[nn.Module] = []
        for i in range(num_layers - 1):
            modules.append(nn.Linear(dims[i], dims[i + 1], bias=not batch_norm))
            if batch_norm:
                modules.append(nn.BatchNorm1d(dims[i + 1]))
            modules.append(nn.ReLU(inplace=True))
        modules.append(nn.Linear(dims[-2], out_dim, bias=last_bias and last_batch_norm == "none"))
        if last_batch_norm != "none":
            norm = nn.BatchNorm1d(out_dim, affine=last_batch_norm != "plain")
            if last_batch_norm == "scale":
                norm.bias.requires_grad_(False)
            modules.append(norm)
        super().__init__(*modules)


class DINOHead(nn.Module):
    """An MLP with GELU to the unit sphere, then the cosine to every prototype (DINO, arXiv:2104.14294, section 3.1).

    The prototypes are the rows of the authors' weight-normalized last layer, whose scale is fixed at 1. As there they
    start with a length of about 0.58, torch's default for a linear layer: the shorter a row, the faster a gradient
    step rotates it. Cosines are computed in float32, since the temperatures that follow magnify rounding.

    Args:
        in_dim: width of the input.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: dimension of the sphere's space.
        num_prototypes: width of the output.
        num_layers: number of linear layers before the sphere.
        batch_norm: normalize every hidden layer.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        bottleneck_dim: int,
        num_prototypes: int,
        num_layers: int = 3,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        dims = [in_dim] + [hidden_dim] * (num_layers - 1) + [bottleneck_dim]
        modules: list[nn.Module] = []
        for i in range(num_layers):
            last = i == num_layers - 1
            linear = nn.Linear(dims[i], dims[i + 1], bias=last or not batch_norm)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
            modules += [linear, *([nn.BatchNorm1d(dims[i + 1])] if batch_norm and not last else [])]
            modules += [] if last else [nn.GELU()]
        self.mlp = nn.Sequential(*modules)
        bound = bottleneck_dim**-0.5  # torch's default for a linear layer
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, bottleneck_dim).uniform_(-bound, bound))

    def forward(self, x: Float[Tensor, "*batch in_dim"]) -> Float[Tensor, "*batch prototypes"]:
        z = self.mlp(x)
        with full_precision(z):
            return F.normalize(z.float(), dim=-1) @ F.normalize(self.prototypes, dim=1).T
