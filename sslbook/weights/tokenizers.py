"""Tokenizers from runs: what BEiT, BEiT v2 and CAE are given as `--method.tokenizer`."""

from pathlib import Path

from torch import nn

from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.nn.tokenizers import Tokenizer
from sslbook.weights.backbone import load_backbone


def open_tokenizer(
    tokenizer: nn.Module | str | Path | None, kind: type[nn.Module], made_by: str, view: View, rows: int
) -> Tokenizer:
    """A trained tokenizer, frozen, for a method's images.

    Args:
        tokenizer: a run folder, an exported encoder, or a module, which gets images normalized as the view's.
        kind: the class that it must have.
        made_by: the method that trains such tokenizers, for messages.
        view: how the method's images are normalized.
        rows: the method's patches along a side of the image.

    Raises:
        UserError: nothing usable is there, or it is no tokenizer of this kind.
    """
    cure = f"train one with python -m sslbook.train {made_by} and set --method.tokenizer to its run folder"
    normalization = None
    if not isinstance(tokenizer, nn.Module):
        if tokenizer is None or not Path(tokenizer).exists():
            what = "there is no tokenizer:" if tokenizer is None else f"{tokenizer}: no such run folder or file;"
            raise UserError(f"{what} {cure}")
        tokenizer, description = load_backbone(tokenizer)
        images = {"mean": View().mean, "std": View().std, **description.get("view", {})}
        normalization = (tuple(images["mean"]), tuple(images["std"]))
    if not isinstance(tokenizer, kind):
        raise UserError(f"a {type(tokenizer).__name__} cannot be the tokenizer, a {kind.__name__} is needed: {cure}")
    return Tokenizer(tokenizer, view, rows, normalization)
