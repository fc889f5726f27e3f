"""State dicts of other libraries and releases, under the names of this package: a table of renamings for each.

Our ResNets have torchvision's names and our transformers timm's, which the releases of MoCo, SimCLR in PyTorch, BYOL,
SwAV, Barlow Twins, VICReg, DINO, iBOT, MAE and many others share. What stands before the names (`module.encoder_q.`,
`teacher.backbone.`, `classy_state_dict.base_model.model.trunk._feature_blocks.`) is found and not listed: it is the
prefix with which most tensors fit.
"""

import argparse
import pathlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslbook.checkpoint import read
from sslbook.errors import UserError

Tensors = dict[str, Tensor]
Table = tuple[tuple[str, str | Callable[[re.Match], str]], ...]

_HF_COMMON: Table = (  # Hugging Face's vision transformers
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"attention\.attention\.query\.", "attn.q."),
    (r"attention\.attention\.key\.", "attn.k."),
    (r"attention\.attention\.value\.", "attn.v."),
    (r"attention\.output\.dense\.", "attn.proj."),
)
TABLES: dict[str, Table] = {
    "timm, torchvision": (  # as our own, but for BEiT's older names
        (r"\.gamma_([12])$", r".ls\1.gamma"),
        (r"rel_pos_bias\.relative_position_bias_table$", "rel_pos_bias.table"),
    ),
    "MMSelfSup, MMPretrain": (
        (r"patch_embed\.projection\.", "patch_embed.proj."),
        (r"layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
        (r"layers\.(\d+)\.attn\.gamma1\.weight$", r"blocks.\1.ls1.gamma"),
        (r"layers\.(\d+)\.ffn\.gamma2\.weight$", r"blocks.\1.ls2.gamma"),
        (r"layers\.(\d+)\.gamma_([12])$", r"blocks.\1.ls\2.gamma"),
        (r"layers\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.mlp.fc1."),
        (r"layers\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.mlp.fc2."),
        (r"layers\.(\d+)\.attn\.", r"blocks.\1.attn."),
        (r"(^|\.)ln1\.", r"\1norm."),
    ),
    "Hugging Face ViT, ViTMAE": (
        *_HF_COMMON,
        (r"layernorm_before\.", "norm1."),
        (r"layernorm_after\.", "norm2."),
        (r"intermediate\.dense\.", "mlp.fc1."),
        (r"(blocks\.\d+\.)output\.dense\.", r"\1mlp.fc2."),
        (r"layernorm\.", "norm."),
    ),
    "Hugging Face Dinov2": (
        *_HF_COMMON,
        (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
        (r"layernorm\.", "norm."),
    ),
    "Hugging Face ResNet": (
        (r"embedder\.embedder\.convolution\.", "conv1."),
        (r"embedder\.embedder\.normalization\.", "bn1."),
        (r"encoder\.stages\.(\d+)\.layers\.", lambda found: f"layer{int(found[1]) + 1}."),
        (r"\.layer\.(\d+)\.convolution\.", lambda found: f".conv{int(found[1]) + 1}."),
        (r"\.layer\.(\d+)\.normalization\.", lambda found: f".bn{int(found[1]) + 1}."),
        (r"\.shortcut\.convolution\.", ".downsample.0."),
        (r"\.shortcut\.normalization\.", ".downsample.1."),
    ),
    "torchvision's transformers": (
        (r"class_token$", "cls_token"),
        (r"conv_proj\.", "patch_embed.proj."),
        (r"encoder\.pos_embedding$", "pos_embed"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"self_attention\.in_proj_", "attn.qkv."),
        (r"self_attention\.out_proj\.", "attn.proj."),
        (r"mlp\.(?:0|linear_1)\.", "mlp.fc1."),
        (r"mlp\.(?:3|linear_2)\.", "mlp.fc2."),
        (r"encoder\.ln\.", "norm."),
    ),
}
# Which of two networks in one file is evaluated in its paper; one that bears none of these words comes after them.
PREFERRED = ("teacher", "target_encoder", "ema", "encoder_q", "base_encoder", "online")


class Translated(NamedTuple):
    """A tensor of a file under a name of ours."""

    value: Tensor
    sources: tuple[str, ...]
    """its names in the file; several if it was put together from parts"""


class Match(NamedTuple):
    """The table, scope and prefix with which most tensors fit a module."""

    tensors: dict[str, Translated]
    """by the module's names; their shapes need not fit"""
    prefix: str
    """what stands before the names in the file"""


def read_tensors(path: Path) -> Tensors:
    """All tensors of a file of torch or safetensors, nested ones with their path: `state_dict.module.conv1.weight`.

    Raises:
        UserError: the file cannot be read, or would execute code.
    """
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    # Plain containers of options and paths, which the authors of DINO and others have saved beside the weights.
    with torch.serialization.safe_globals([argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath]):
        state = read(path)
    if isinstance(state, dict) and isinstance(state.get("method"), dict):  # a checkpoint of ours
        state = state["method"]
    return flattened(state)


def flattened(state: Any) -> Tensors:
    """The tensors in nested mappings by their path, without an optimizer's."""
    found: Tensors = {}
    stack = [("", state)]
    for _ in range(100_000):  # a file may hold itself
        if not stack:
            break
        path, value = stack.pop()
        if isinstance(value, Tensor):
            found[path] = value
        elif isinstance(value, Mapping):
            parts = [(f"{path}.{key}".lstrip("."), part) for key, part in value.items() if "optimizer" not in str(key)]
            stack += reversed(parts)
    return found


def read_safetensors(path: Path) -> Tensors:
    """The tensors of a safetensors file.

    Raises:
        UserError: the file is missing or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        reason = "no such run folder or file"
    except PermissionError:
        reason = "cannot be read: permission denied"
    except (SafetensorError, OSError, ValueError):
        reason = "truncated, or not a safetensors file"
    raise UserError(f"{path}: {reason}")


def translated(tensors: Tensors, table: Table) -> dict[str, Translated]:
    """The tensors under the names that a table gives them; separate queries, keys and values become one tensor too."""
    out: dict[str, Translated] = {}
    for name, value in tensors.items():
        new = name
        for pattern, replacement in table:
            new = re.sub(pattern, replacement, new)
        out[new] = Translated(value, (name,))
    for name in list(out):
        parts: list[Translated | None] = []
        if name.endswith(("attn.q.weight", "attn.q.bias")):
            start, _, kind = name.rpartition("q.")
            parts, fused = [out.get(f"{start}{one}.{kind}") for one in "qkv"], f"{start}qkv.{kind}"
        elif name.endswith("attn.q_bias"):  # BEiT's keys have no bias
            start = name.removesuffix("q_bias")
            zero = Translated(torch.zeros_like(out[name].value), ())
            parts, fused = [out[name], zero, out.get(f"{start}v_bias")], f"{start}qkv.bias"
        if parts and None not in parts:
            whole = [part for part in parts if part is not None]
            out[fused] = Translated(torch.cat([p.value for p in whole]), sum((p.sources for p in whole), ()))
    return out


def best_match(own: Tensors, tensors: Tensors) -> Match | None:
    """The tensors of a file under the names of a module, or of the backbone in it; None if no tensor fits.

    Args:
        own: the module's state dict.
        tensors: what `read_tensors` gives.
    """
    best: tuple[tuple[int, int, int], dict[str, Translated], str, str] | None = None
    for table in TABLES.values():
        found = translated(tensors, table)
        for scope in ("", "backbone.", "backbone.backbone."):
            inside = {name.removeprefix(scope): value.shape for name, value in own.items() if name.startswith(scope)}
            fits: Counter[str] = Counter()
            for name, one in found.items():
                for start in (0, *(dot.end() for dot in re.finditer(r"\.", name))):
                    if (shape := inside.get(name[start:])) is not None:  # a name alone counts little
                        fits[name[:start]] += 1000 if shape == one.value.shape else 1
            for prefix, count in fits.items():
                rank = next((i for i, word in enumerate(PREFERRED) if word in prefix), len(PREFERRED))
                score = (count, -rank if prefix or scope else 1, -len(prefix))
                if best is None or score > best[0]:
                    best = (score, found, scope, prefix)
    if best is None:
        return None
    _, found, scope, prefix = best
    tensors_by_name = {
        scope + name.removeprefix(prefix): one
        for name, one in found.items()
        if name.startswith(prefix) and scope + name.removeprefix(prefix) in own
    }
    return Match(tensors_by_name, prefix)
