"""The self-supervised methods, one file each; a file is meant to be read from top to bottom."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sslbook.errors import require_known

if TYPE_CHECKING:
    from sslbook.methods.base import Method

METHODS = {
    "relative_location": "sslbook.methods.relative_location.RelativeLocation",
    "jigsaw": "sslbook.methods.jigsaw.Jigsaw",
    "colorization": "sslbook.methods.colorization.Colorization",
    "context_encoder": "sslbook.methods.context_encoder.ContextEncoder",
    "rotation": "sslbook.methods.rotation.Rotation",
    "exemplar": "sslbook.methods.exemplar.Exemplar",
    "npid": "sslbook.methods.npid.NPID",
    "moco": "sslbook.methods.moco.MoCo",
    "moco_v3": "sslbook.methods.moco_v3.MoCoV3",
    "pirl": "sslbook.methods.pirl.PIRL",
    "simclr": "sslbook.methods.simclr.SimCLR",
    "nnclr": "sslbook.methods.nnclr.NNCLR",
    "densecl": "sslbook.methods.densecl.DenseCL",
    "interclr": "sslbook.methods.interclr.InterCLR",
    "deepcluster": "sslbook.methods.deepcluster.DeepCluster",
    "odc": "sslbook.methods.odc.ODC",
    "swav": "sslbook.methods.swav.SwAV",
    "deepcluster_v2": "sslbook.methods.deepcluster_v2.DeepClusterV2",
    "byol": "sslbook.methods.byol.BYOL",
    "simsiam": "sslbook.methods.simsiam.SimSiam",
    "wmse": "sslbook.methods.wmse.WMSE",
    "barlow_twins": "sslbook.methods.barlow_twins.BarlowTwins",
    "vicreg": "sslbook.methods.vicreg.VICReg",
    "lejepa": "sslbook.methods.lejepa.LeJEPA",
    "dino": "sslbook.methods.dino.DINO",
    "msn": "sslbook.methods.msn.MSN",
    "ibot": "sslbook.methods.ibot.IBOT",
    "data2vec": "sslbook.methods.data2vec.Data2Vec",
    "ijepa": "sslbook.methods.ijepa.IJEPA",
    "dvae": "sslbook.methods.dvae.DVAE",
    "beit": "sslbook.methods.beit.BEiT",
    "vqkd": "sslbook.methods.vqkd.VQKD",
    "beit_v2": "sslbook.methods.beit_v2.BEiTv2",
    "cae": "sslbook.methods.cae.CAE",
    "mae": "sslbook.methods.mae.MAE",
    "simmim": "sslbook.methods.simmim.SimMIM",
    "maskfeat": "sslbook.methods.maskfeat.MaskFeat",
    "pixmim": "sslbook.methods.pixmim.PixMIM",
    "mff": "sslbook.methods.mff.MFF",
    "milan": "sslbook.methods.milan.MILAN",
    "eva": "sslbook.methods.eva.EVA",
    "mixmim": "sslbook.methods.mixmim.MixMIM",
    "spark": "sslbook.methods.spark.SparK",
}
"""Short names of the methods and the import paths of their classes, which are imported when first used."""


def load(name: str) -> type["Method"]:
    """The class of a method.

    Raises:
        UserError: there is no method of this name; names the nearest one.
    """
    require_known(name, METHODS, f"there is no method {name}")
    module, _, cls = METHODS[name].rpartition(".")
    return getattr(import_module(module), cls)


_CLASSES = {path.rpartition(".")[2]: name for name, path in METHODS.items()}


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return load(_CLASSES[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_CLASSES])
