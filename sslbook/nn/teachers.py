"""Frozen networks that say what is in every patch of an image: the targets of MILAN and EVA.

A teacher is one of our own runs or exported backbones, a model of timm, open_clip or transformers by name, or any module
whose result, or whose `forward_map`, is a map of features `(n, dim, rows, columns)`. It is never trained, and stays in
evaluation mode.
"""

import inspect
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.nn.backbones import timm_model
from sslbook.nn.vit import VisionTransformer
from sslbook.weights.backbone import load_backbone

HOW = (
    "a run folder or exported backbone of ours, timm/NAME, open_clip/NAME:WEIGHTS, transformers/NAME, "
    "or a module by class_path"
)


class Seen(NamedTuple):
    """What a teacher says of images."""

    patches: Float[Tensor, "batch patches dim"]
    attention: Float[Tensor, "batch patches"]
    """how much of the whole each patch is: sums to 1"""
    cls: Float[Tensor, "batch dim"] | None
    """the class token's feature, where there is one"""
    grid: tuple[int, int]


class Teacher(nn.Module):
    """A frozen network, given the images that a student sees in the normalization and size that it wants.

    Its attention is that of the class token in the last layer, averaged over heads. A network without class token is
    read by its average pooling: a patch counts as much as it contributes to the length of the mean feature.

    Args:
        model: one of the above, as a name or a module; a module gets images normalized as the student's.
        view: what the student's images are like.
        size: the side to which the images are brought; null leaves them as they are.

    Raises:
        UserError: there is no such teacher, or it makes no map of features.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module | str | None, view: View, size: int | None = None) -> None:
        super().__init__()
        if model is None:
            raise UserError(f"there is no teacher: set --method.teacher to {HOW}")
        mean, std = view.mean, view.std
        side = size or view.size
        if isinstance(model, str):
            self.name = model
            model, mean, std = open_model(model, side, (mean, std))
        else:
            self.name = type(model).__name__
        self.model = model.requires_grad_(False)
        self.size = size
        # (x * std_of_view + mean_of_view - mean) / std, for the images that arrive normalized by the view.
        own_mean, own_std, mean_, std_ = (torch.tensor(v).view(3, 1, 1) for v in (view.mean, view.std, mean, std))
        self.register_buffer("scale", own_std / std_, persistent=False)
        self.register_buffer("shift", (own_mean - mean_) / std_, persistent=False)
        self.train(False)
        seen = self(torch.zeros(1, 3, view.size, view.size, device=self.scale.device))
        self.grid, self.dim, self.has_cls = seen.grid, seen.patches.shape[2], seen.cls is not None
        self.cell = side // self.grid[0]

    def train(self, mode: bool = True) -> "Teacher":
        """A teacher stays in evaluation mode."""
        return super().train(False)

    def require_grid(self, grid: tuple[int, int]) -> None:
        """A `UserError` that names both grids and the cure if the student's patches are not the teacher's."""
        if self.grid != grid:
            raise UserError(
                f"the teacher {self.name} sees a grid of {self.grid[0]}x{self.grid[1]} patches and the student one of "
                f"{grid[0]}x{grid[1]}: give the teacher images of {grid[0] * self.cell} pixels "
                f"(--method.teacher_size {grid[0] * self.cell}), or choose another patch_size of the backbone"
            )

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Seen:
        if self.size is not None and x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        x = x * self.scale + self.shift
        if isinstance(self.model, VisionTransformer):
            seen = _of_ours(self.model, x)
        elif isinstance(self.model, (_OpenCLIP, _Transformers)):
            seen = self.model(x)
        elif hasattr(self.model, "forward_intermediates"):
            seen = _of_timm(self.model, x)
        else:
            make_map: Any = getattr(self.model, "forward_map", self.model)
            seen = _of_map(make_map(x), self.name)
        return Seen(
            seen.patches.float(), seen.attention.float(), None if seen.cls is None else seen.cls.float(), seen.grid
        )


# -- teachers by name --------------------------------------------------------------------------------------------------

Numbers = tuple[float, ...]


def open_model(name: str, size: int, normalization: tuple[Numbers, Numbers]) -> tuple[nn.Module, Numbers, Numbers]:
    """The model of a name, and mean and deviation of its images: those given, if it does not say."""
    library, _, rest = name.partition("/")
    if library == "timm":
        model: Any = timm_model(rest, pretrained=True)
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=(size, size))
        return model, tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])
    if library == "open_clip":
        return _open_clip(rest, size, normalization)
    if library == "transformers":
        return _transformers(rest, normalization)
    if not Path(name).exists():
        known = "; `python -m sslbook.train` makes runs/simclr-shapes" if name == "runs/simclr-shapes" else ""
        raise UserError(f"teacher {name}: no such run folder or exported backbone{known}; a teacher is {HOW}")
    model, facts = load_backbone(name)
    view = facts.get("view", {})
    return model, tuple(view.get("mean", normalization[0])), tuple(view.get("std", normalization[1]))


def _open_clip(name: str, size: int, normalization: tuple[Numbers, Numbers]) -> tuple[nn.Module, Numbers, Numbers]:
    try:
        import open_clip  # pyrefly: ignore
    except ImportError:
        raise UserError('teachers open_clip/... need open_clip: python -m pip install "sslbook[open_clip]"') from None
    architecture, _, weights = name.partition(":")
    visual = open_clip.create_model(architecture, pretrained=weights or None, force_image_size=size).visual
    if not hasattr(visual, "output_tokens"):
        raise UserError(f"{architecture} is no transformer of open_clip: take its ViT-B-16:openai, or timm/NAME")
    mean, std = (getattr(visual, f"image_{key}", None) or normalization[i] for i, key in enumerate(("mean", "std")))
    return _OpenCLIP(visual), tuple(mean), tuple(std)


def _transformers(name: str, normalization: tuple[Numbers, Numbers]) -> tuple[nn.Module, Numbers, Numbers]:
    try:
        import transformers  # pyrefly: ignore
    except ImportError:
        raise UserError('teachers transformers/... need it: python -m pip install "sslbook[transformers]"') from None
    # Only this implementation of attention hands its weights out.
    model = transformers.AutoModel.from_pretrained(name, attn_implementation="eager")
    processor = transformers.AutoImageProcessor.from_pretrained(name)
    return _Transformers(getattr(model, "vision_model", model)), tuple(processor.image_mean), tuple(processor.image_std)


class _OpenCLIP(nn.Module):
    """The image's side of a model of open_clip with a class token: patches after the last norm."""

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        tower: Any = visual
        tower.output_tokens = True
        self.visual = tower

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Seen:
        attention = _Watch(self.visual)
        with attention:
            pooled, tokens = self.visual(x)
        side = int(tokens.shape[1] ** 0.5)
        # The pooled feature has gone through a projection to the text's space, which patches have not.
        cls = pooled if pooled.shape[1] == tokens.shape[2] else None
        return Seen(tokens, attention.of_cls(prefix=1), cls, (side, side))


class _Transformers(nn.Module):
    """A vision transformer of transformers with a class token: its last hidden state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Seen:
        patch = self.model.config.patch_size
        grid = (x.shape[2] // patch, x.shape[3] // patch)
        options = {"output_attentions": True, "interpolate_pos_encoding": True}
        accepted = inspect.signature(self.model.forward).parameters  # DINOv2 always interpolates, and does not ask
        out = self.model(pixel_values=x, **{key: value for key, value in options.items() if key in accepted})
        tokens = out.last_hidden_state
        prefix = tokens.shape[1] - grid[0] * grid[1]
        if prefix == 0:
            return _of_patches(tokens, grid)
        weights = out.attentions[-1].mean(dim=1)[:, 0, prefix:]
        return Seen(tokens[:, prefix:], _shares(weights), tokens[:, 0], grid)


# -- how each kind is read ---------------------------------------------------------------------------------------------


def _shares(weights: Float[Tensor, "batch patches"]) -> Float[Tensor, "batch patches"]:
    """Weights of the patches that sum to 1; all the same where there are none."""
    weights = weights.float()
    total = weights.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp_min(1e-12), 1 / weights.shape[1])


def _of_map(maps: Any, name: str) -> Seen:
    if not isinstance(maps, Tensor) or maps.ndim != 4:
        raise UserError(
            f"the teacher {name} makes no map of features (n, dim, rows, columns): "
            "give it a forward_map that does, or choose another"
        )
    return _of_patches(rearrange(maps, "b d h w -> b (h w) d"), (maps.shape[2], maps.shape[3]))


def _of_patches(patches: Float[Tensor, "batch patches dim"], grid: tuple[int, int]) -> Seen:
    contribution = (patches @ patches.mean(dim=1, keepdim=True).mT)[:, :, 0]  # sums to n times the mean's square
    return Seen(patches, _shares(contribution.float().clamp_min(0)), None, grid)


def _of_ours(model: VisionTransformer, x: Float[Tensor, "batch 3 height width"]) -> Seen:
    grid = (x.shape[2] // model.patch_size, x.shape[3] // model.patch_size)
    *_, before, last = [model.prepend_cls(tokens := model.embed(x)), *model.layers(tokens)]
    block = model.blocks[-1]
    bias = model.rel_pos_bias() if model.rel_pos_bias is not None else None
    weights = attention_of_cls(block.attn.qkv(block.norm1(before)), block.attn.num_heads, bias)  # pyrefly: ignore
    tokens = model.norm(last)
    return Seen(tokens[:, 1:], _shares(weights[:, 1:]), tokens[:, 0], grid)


def _of_timm(model: Any, x: Float[Tensor, "batch 3 height width"]) -> Seen:
    if not getattr(model, "num_prefix_tokens", 0):
        (maps,) = model.forward_intermediates(x, indices=1, norm=hasattr(model, "norm"), intermediates_only=True)
        return _of_map(maps, type(model).__name__)
    rows, columns = (x.shape[i + 2] // model.patch_embed.patch_size[i] for i in range(2))
    attention = _Watch(model)
    with attention:
        tokens = model.forward_features(x)
    prefix = model.num_prefix_tokens
    cls = tokens[:, 0] if getattr(model, "cls_token", None) is not None else None
    return Seen(tokens[:, prefix:], attention.of_cls(prefix), cls, (rows, columns))


def attention_of_cls(
    qkv: Float[Tensor, "batch tokens three_dims"],
    num_heads: int,
    bias: Float[Tensor, "heads tokens tokens"] | None = None,
) -> Float[Tensor, "batch tokens"]:
    """How much the first token attends to each, averaged over heads."""
    q, k, _ = rearrange(qkv.float(), "b n (three h d) -> three b h n d", three=3, h=num_heads)
    scores = (q[:, :, :1] @ k.mT)[:, :, 0] / q.shape[-1] ** 0.5
    return (scores if bias is None else scores + bias[:, 0].float()).softmax(dim=-1).mean(dim=1)


class _Watch:
    """Keeps the weights of a network's last attention while the `with` block runs.

    Attention of torch is computed again from what comes into it. Timm's comes in many forms (norms of queries, rotary
    or relative positions), so it is made to leave the fused kernel, and its weights are read where its dropout is.
    """

    def __init__(self, model: nn.Module) -> None:
        found = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention) or hasattr(m, "attn_drop")]
        self.attention: Any = found[-1] if found else None
        self.weights: Tensor | None = None

    def __enter__(self) -> None:
        if isinstance(self.attention, nn.MultiheadAttention):
            self.handle = self.attention.register_forward_pre_hook(self._compute, with_kwargs=True)
        elif self.attention is not None:
            self.fused, self.attention.fused_attn = getattr(self.attention, "fused_attn", False), False
            self.handle = self.attention.attn_drop.register_forward_pre_hook(self._keep)

    def __exit__(self, *_: object) -> None:
        if self.attention is not None:
            self.handle.remove()
        if not isinstance(self.attention, nn.MultiheadAttention | None):
            self.attention.fused_attn = self.fused

    def _compute(self, attention: Any, inputs: tuple, named: dict) -> None:
        x = inputs[0] if inputs else named["query"]
        qkv = F.linear(
            x if attention.batch_first else x.transpose(0, 1), attention.in_proj_weight, attention.in_proj_bias
        )
        self.weights = attention_of_cls(qkv, attention.num_heads)

    def _keep(self, _: nn.Module, inputs: tuple) -> None:
        self.weights = inputs[0][:, :, 0].mean(dim=1)

    def of_cls(self, prefix: int) -> Float[Tensor, "batch patches"]:
        if self.weights is None:
            raise UserError("the teacher has no attention that can be read: choose another")
        return _shares(self.weights[:, prefix:])
