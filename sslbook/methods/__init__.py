"""What is learned: one milestone, one file, to be read from top to bottom."""

from importlib import import_module
from typing import TYPE_CHECKING

from sslbook.errors import UserError, nearest

if TYPE_CHECKING:
    from sslbook.methods.base import Method

METHODS = {
    "rotation": "sslbook.methods.rotation.Rotation",
    "relative_location": "sslbook.methods.relative_location.RelativeLocation",
    "jigsaw": "sslbook.methods.jigsaw.Jigsaw",
    "colorization": "sslbook.methods.colorization.Colorization",
    "context_encoder": "sslbook.methods.context_encoder.ContextEncoder",
    "simclr": "sslbook.methods.simclr.SimCLR",
    "moco": "sslbook.methods.moco.MoCo",
    "byol": "sslbook.methods.byol.BYOL",
    "simsiam": "sslbook.methods.simsiam.SimSiam",
    "barlow_twins": "sslbook.methods.barlow_twins.BarlowTwins",
    "vicreg": "sslbook.methods.vicreg.VICReg",
    "wmse": "sslbook.methods.wmse.WMSE",
    "nnclr": "sslbook.methods.nnclr.NNCLR",
    "moco_v3": "sslbook.methods.moco_v3.MoCoV3",
    "densecl": "sslbook.methods.densecl.DenseCL",
    "lejepa": "sslbook.methods.lejepa.LeJEPA",
    "swav": "sslbook.methods.swav.SwAV",
    "npid": "sslbook.methods.npid.NPID",
    "pirl": "sslbook.methods.pirl.PIRL",
    "deepcluster": "sslbook.methods.deepcluster.DeepCluster",
    "deepcluster_v2": "sslbook.methods.deepcluster_v2.DeepClusterV2",
    "dino": "sslbook.methods.dino.DINO",
    "odc": "sslbook.methods.odc.ODC",
    "exemplar": "sslbook.methods.exemplar.Exemplar",
    "interclr": "sslbook.methods.interclr.InterCLR",
    "ibot": "sslbook.methods.ibot.IBOT",
    "msn": "sslbook.methods.msn.MSN",
    "data2vec": "sslbook.methods.data2vec.Data2Vec",
    "ijepa": "sslbook.methods.ijepa.IJEPA",
    "mae": "sslbook.methods.mae.MAE",
    "milan": "sslbook.methods.milan.MILAN",
    "eva": "sslbook.methods.eva.EVA",
    "spark": "sslbook.methods.spark.SparK",
    "mixmim": "sslbook.methods.mixmim.MixMIM",
    "simmim": "sslbook.methods.simmim.SimMIM",
    "maskfeat": "sslbook.methods.maskfeat.MaskFeat",
    "pixmim": "sslbook.methods.pixmim.PixMIM",
    "mff": "sslbook.methods.mff.MFF",
    "dvae": "sslbook.methods.dvae.DVAE",
    "beit": "sslbook.methods.beit.BEiT",
    "vqkd": "sslbook.methods.vqkd.VQKD",
    "beit_v2": "sslbook.methods.beit_v2.BEiTv2",
    "cae": "sslbook.methods.cae.CAE",
}
"""Short names of the methods, and where their classes live; nothing is imported until it is used."""


def load(name: str) -> type["Method"]:
    """The class behind a short name; a `UserError` names the nearest one if there is none."""
    if name not in METHODS:
        raise UserError(f"there is no method {name}{nearest(name, list(METHODS))}")
    module, _, cls = METHODS[name].rpartition(".")
    return getattr(import_module(module), cls)
