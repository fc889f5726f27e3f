"""Teachers by name: what MILAN, EVA and VQ-KD are given as `--method.teacher`."""

from pathlib import Path
from typing import Any

from torch import nn

from sslbook.data.views import View
from sslbook.errors import UserError
from sslbook.nn.backbones import timm_model
from sslbook.nn.teachers import Teacher
from sslbook.weights.backbone import load_backbone

TEACHERS = (
    "a run folder or exported backbone of ours, timm/NAME (CLIP is timm/vit_base_patch16_clip_quickgelu_224.openai), "
    "or a module by class_path"
)


def open_teacher(teacher: nn.Module | str | None, view: View, size: int | None = None) -> Teacher:
    """A frozen network for a method's images, in the normalization that it was trained with.

    Args:
        teacher: a run folder, an exported backbone, timm/NAME, or a module, which gets images normalized as the view's.
        view: size and normalization of the method's images.
        size: side in pixels of the teacher's images; null leaves them as they are.

    Raises:
        UserError: there is no such teacher, or it makes no feature map.
    """
    if isinstance(teacher, nn.Module):
        return Teacher(teacher, view, size)
    if teacher is not None and teacher.startswith("timm/"):
        model: Any = timm_model(teacher.removeprefix("timm/"), pretrained=True)
        if hasattr(model, "set_input_size"):
            side = size or view.size
            model.set_input_size(img_size=(side, side))
        normalization = (tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"]))
        return Teacher(model, view, size, normalization, teacher)
    if teacher is None or not Path(teacher).exists():
        what = (
            "there is no teacher" if teacher is None else f"teacher {teacher}: no such run folder or exported backbone"
        )
        known = "; `python -m sslbook.train` makes runs/simclr-shapes" if teacher == "runs/simclr-shapes" else ""
        raise UserError(f"{what}{known}: set --method.teacher to {TEACHERS}")
    model, description = load_backbone(teacher)
    images = {"mean": view.mean, "std": view.std, **description.get("view", {})}
    return Teacher(model, view, size, (tuple(images["mean"]), tuple(images["std"])), teacher)
