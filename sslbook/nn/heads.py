"""The small networks between a backbone and a loss."""

from typing import Literal

from torch import nn


class MLP(nn.Sequential):
    """Linear maps with ReLU in between: the projector and predictor of most methods.

    A linear map that batch norm follows has no bias, since batch norm subtracts it again.

    Args:
        in_dim: width of what comes in.
        hidden_dim: width of the hidden layers.
        out_dim: width of what comes out.
        layers: number of linear maps; with 1 there is no hidden layer.
        batch_norm: normalize every hidden layer.
        last_batch_norm: normalize the output: `none`; `plain` without learned scale and shift; `scale` with a learned
            scale and the shift kept at zero; `affine` with both.
        last_bias: give the last linear map a bias, unless batch norm follows.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        out_dim: int,
        layers: int = 2,
        batch_norm: bool = True,
        last_batch_norm: Literal["none", "plain", "scale", "affine"] = "none",
        last_bias: bool = True,
    ) -> None:
        dims = [in_dim] + [hidden_dim] * (layers - 1) + [out_dim]
        modules: list[nn.Module] = []
        for i in range(layers - 1):
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
