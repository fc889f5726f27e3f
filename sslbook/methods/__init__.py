"""What is learned: one milestone, one file, to be read from top to bottom."""

from importlib import import_module
from typing import TYPE_CHECKING

from sslbook.errors import UserError, nearest

if TYPE_CHECKING:
    from sslbook.methods.base import Method

METHODS = {
    "rotation": "sslbook.methods.rotation.Rotation",
    "simclr": "sslbook.methods.simclr.SimCLR",
    "moco": "sslbook.methods.moco.MoCo",
    "byol": "sslbook.methods.byol.BYOL",
    "mae": "sslbook.methods.mae.MAE",
}
"""Short names of the methods, and where their classes live; nothing is imported until it is used."""


def load(name: str) -> type["Method"]:
    """The class behind a short name; a `UserError` names the nearest one if there is none."""
    if name not in METHODS:
        raise UserError(f"there is no method {name}{nearest(name, list(METHODS))}")
    module, _, cls = METHODS[name].rpartition(".")
    return getattr(import_module(module), cls)
