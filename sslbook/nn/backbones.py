"""What a backbone is, the models of timm as backbones, and how a backbone is described and built again.

A backbone maps images to one feature each. That is all that most methods ask for. Some ask for more, and find it by the
name of a method: `forward_map` and `forward_stages` give feature maps, `forward_tokens` gives tokens, with a mask token
in place of masked patches. A network of your own offers what it has; `require` reports what is missing.
"""

import inspect
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sslbook.errors import UserError, explained, import_attribute, import_extra, require_known
from sslbook.types import PositiveInt


@runtime_checkable
class Backbone(Protocol):
    """Images to one feature each: what every method, exporter and evaluation can count on."""

    dim: int
    """width of a feature"""

    def __call__(self, x: Float[Tensor, "batch channels height width"], /) -> Float[Tensor, "batch dim"]:
        """One feature for every image."""
        ...


@runtime_checkable
class MapBackbone(Backbone, Protocol):
    """A backbone with a feature map."""

    def forward_map(
        self, x: Float[Tensor, "batch channels height width"], /
    ) -> Float[Tensor, "batch dim rows columns"]:
        """The last feature map, before pooling."""
        ...


@runtime_checkable
class StagesBackbone(MapBackbone, Protocol):
    """A backbone with feature maps of several resolutions. (In timm `stages` is a submodule, hence the name.)"""

    def forward_stages(self, x: Float[Tensor, "batch channels height width"], /) -> list[Tensor]:
        """The last feature map of every resolution `(batch, channels, rows, columns)`, fine to coarse."""
        ...


@runtime_checkable
class TokenBackbone(MapBackbone, Protocol):
    """A backbone that embeds patches as tokens, of which some can be replaced by a mask token."""

    patch_size: int
    """side in pixels of the patch that a mask token can replace"""
    token_dim: int
    """width of an embedded patch, and so of the mask token"""
    stride: int
    """side in pixels of what one token of the last layer, or one cell of the last map, stands for"""
    num_prefix_tokens: int
    """tokens of the last layer before those of the patches: 1 with a class token"""

    def forward_tokens(
        self,
        x: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch patches"] | None = None,
        mask_token: Float[Tensor, "... token_dim"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """The last layer's tokens, normalized: the prefix tokens, then the patches, row by row.

        Where `mask` is true, `mask_token` replaces the embedded patch before the first block.
        """
        ...

    def forward_attention(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch tokens"]]:
        """As `forward_tokens`, and how much the first token, the class token, attends to each in the last block.

        The mean over attention heads.
        """
        ...


NEEDS = {
    "forward_map": (
        "a feature map",
        "sslbook.nn.ResNet, ConvNet or VisionTransformer, timm/NAME, or a network with a method forward_map",
    ),
    "forward_stages": (
        "feature maps of several resolutions",
        "sslbook.nn.ResNet, resnet50 and the like, sslbook.nn.ConvNet, or a ResNet or ConvNeXt of timm",
    ),
    "forward_tokens": (
        "patches that a mask token can replace",
        "sslbook.nn.VisionTransformer, vit_base and the like, or timm/swin_base_patch4_window7_224",
    ),
}


def require(backbone: nn.Module, need: str, method: str) -> None:
    """Check that a backbone has what a method calls: `forward_map`, `forward_stages` or `forward_tokens`.

    Raises:
        UserError: it has not; names the networks that have it.
    """
    if not callable(getattr(backbone, need, None)):
        what, networks = NEEDS[need]
        raise UserError(f"{method} needs {what} and cannot use a {type(backbone).__name__}: choose {networks}")


BUILDABLE = ("ConvNet", "ResNet", "VisionTransformer", "DiscreteEncoder", "VQTokenizer", "sobel")


def backbone_dim(backbone: nn.Module) -> int:
    """The width of a backbone's features: its attribute `dim`, or what timm's models call it.

    Raises:
        UserError: it has neither.
    """
    for name in ("dim", "head_hidden_size", "num_features"):
        dim = getattr(backbone, name, None)
        if isinstance(dim, int):
            return dim
    if isinstance(backbone, str):
        raise UserError(f"the backbone {backbone!r} is a text: give the network, such as sslbook.nn.resnet18()")
    raise UserError(
        f"the backbone {type(backbone).__name__} does not say how wide its features are: give it an attribute `dim`"
    )


def in_channels(backbone: nn.Module) -> int:
    """Channels of the images that a backbone takes: its attribute `in_channels`, or red, green and blue."""
    return getattr(backbone, "in_channels", 3)


class TimmMaps(nn.Module):
    """What `timm_model` adds to a model with feature maps."""

    def forward_map(
        self: Any, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        (features,) = self.forward_intermediates(x, indices=1, norm=hasattr(self, "norm"), intermediates_only=True)
        return features

    def forward_stages(self: Any, x: Float[Tensor, "batch channels height width"]) -> list[Tensor]:
        features = self.forward_intermediates(x, intermediates_only=True)
        return list({tuple(f.shape[2:]): f for f in features}.values())  # the last of each resolution


class TimmTokens(TimmMaps):
    """What `timm_model` adds to a vision transformer or a Swin."""

    def forward_tokens(
        self: Any,
        x: Float[Tensor, "batch channels height width"],
        mask: Bool[Tensor, "batch patches"] | None = None,
        mask_token: Float[Tensor, "... token_dim"] | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        def put_mask_token(_: nn.Module, inputs: tuple, patches: Tensor) -> Tensor:
            if mask is None or mask_token is None:
                return patches
            return torch.where(mask.view(*patches.shape[:-1], 1), mask_token.to(patches.dtype), patches)

        hook = self.patch_embed.register_forward_hook(put_mask_token)
        try:
            tokens = self.forward_features(x)  # (n, tokens, dim), Swin's (n, rows, columns, dim)
        finally:
            hook.remove()
        return tokens.flatten(1, -2)

    def forward_attention(
        self: Any, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch tokens"]]:
        # Attention comes in many forms (norms of queries, rotary or relative positions), so its weights are read at the
        # input of its dropout, which the fused kernel does not have.
        attention = [module for module in self.modules() if hasattr(module, "attn_drop")][-1]
        kept: list[Tensor] = []
        fused, attention.fused_attn = getattr(attention, "fused_attn", False), False
        hook = attention.attn_drop.register_forward_pre_hook(
            lambda _, inputs: kept.append(inputs[0][:, :, 0].mean(dim=1))
        )
        try:
            return self.forward_tokens(x), kept[-1]
        finally:
            hook.remove()
            attention.fused_attn = fused


def timm_model(name: str, in_channels: PositiveInt = 3, **options: Any) -> nn.Module:
    """Any model of timm by name, without its classifier, as a backbone; its weights keep timm's names.

    Args:
        name: timm's name of the model, such as `convnext_tiny`.
        in_channels: channels of the images.
        options: what `timm.create_model` takes besides, such as `img_size` or `pretrained`.

    Raises:
        UserError: timm is not installed, or has no such model.
    """
    timm = import_extra("timm", "timm")
    if not timm.is_model(name):  # a name may have a tag, .a1_in1k
        require_known(name, timm.list_models(), f"timm has no model {name}")
    model: Any = timm.create_model(name, num_classes=0, **({"in_chans": in_channels} | options))
    model.dim, model.in_channels = backbone_dim(model), options.get("in_chans", in_channels)
    kind = type(model)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    stride = model.feature_info[-1]["reduction"] if getattr(model, "feature_info", None) else 0
    swin = kind.__name__ in ("SwinTransformer", "SwinTransformerV2")
    if swin or (hasattr(model, "num_prefix_tokens") and patch == (stride, stride)):  # no convolutions before its blocks
        added = TimmTokens
        model.patch_size, model.token_dim, model.stride = int(patch[0]), int(model.embed_dim), int(stride)
        model.num_prefix_tokens = 0 if swin else model.num_prefix_tokens
    elif hasattr(model, "forward_intermediates"):
        added = TimmMaps
    else:
        return model
    # A class that inherits from both, under the name of timm's: no wrapper, whose prefix all weights would bear.
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    model.__class__ = type(kind.__name__, (added, kind), names)
    return model


def describe(module: nn.Module) -> dict[str, Any]:
    """Import path and constructor arguments of a module; the arguments are known if it keeps them in `init_args`."""
    init_args = getattr(module, "init_args", None)
    path = f"{type(module).__module__}.{type(module).__qualname__}"
    if init_args is not None:
        path = getattr(module, "class_path", path)
    return {"class_path": path, "init_args": init_args}


def build(description: dict[str, Any]) -> nn.Module:
    """The backbone of a description, with fresh weights.

    Only networks of `sslbook.nn` that are made of numbers alone are built: a description is data, and data must not
    choose what code is run, or what files are read.

    Raises:
        UserError: the description names another network, or arguments that it does not take.
    """
    path, init_args = str(description.get("class_path", "")), description.get("init_args")
    if not path.startswith("sslbook.nn.") or path.rpartition(".")[2] not in BUILDABLE or init_args is None:
        raise UserError(
            f"the backbone {path or '(none)'} is not one of sslbook.nn: build it yourself and pass --backbone"
        )
    make = import_attribute(path, "backbone")
    with explained(f"the backbone {path} cannot be built", Exception):  # altered arguments may be wrong in any way
        inspect.signature(make).bind(**init_args)
        return make(**init_args)
