"""Backbones from elsewhere."""

from typing import Any

from torch import nn

from sslbook.errors import UserError, nearest


def backbone_dim(backbone: nn.Module) -> int:
    """The width of a backbone's features: its attribute `dim`, or what timm's models call it."""
    for name in ("dim", "head_hidden_size", "num_features"):
        dim = getattr(backbone, name, None)
        if isinstance(dim, int):
            return dim
    raise UserError(
        f"the backbone {type(backbone).__name__} does not say how wide its features are: give it an attribute `dim`"
    )


def timm_model(name: str, **options: Any) -> nn.Module:
    """Any model of timm by name, without its classifier.

    Args:
        name: timm's name of the model, such as `convnext_tiny`.
        options: what `timm.create_model` takes besides, such as `img_size` or `pretrained`.
    """
    try:
        import timm
    except ImportError as error:
        raise UserError('models of timm need timm: python -m pip install "sslbook[timm]"') from error
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name}{nearest(name, timm.list_models())}")
    model: Any = timm.create_model(name, num_classes=0, **options)
    model.dim = backbone_dim(model)
    return model
