"""The papers' values, typed once from papers and authors' code: every recipe for ImageNet resolves to them.

What a recipe leaves to a constructor's default is compared too. Rates
are typed as they are used (scaled by the batch), their course as epochs of warm-up and a formula. Where a recipe departs
from its source, `Paper.departs` names the words with which FAITHFULNESS.md says so.
"""

import inspect
import math
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from sslbook.cli.recipes import RECIPES, read_recipe, resolve
from sslbook.data.views import View
from sslbook.engine.loop import pretrain
from sslbook.methods import load
from sslbook.optim import ParamRule
from sslbook.schedules import Clock

IMAGES = 1_281_167
FAITHFULNESS = Path(__file__).parents[1] / "FAITHFULNESS.md"

# -- views: (crop, interpolation, jitter, its probability, grayscale, blur, solarize), flip 0.5, 224 pixels -----------

DEFAULT = {"size": 224, "crop": [0.08, 1.0], "flip": 0.5, "interpolation": "bilinear", "grayscale": 0.0, "blur": 0.0}
DEFAULT |= {"color_jitter": [0.0, 0.0, 0.0, 0.0], "solarize": 0.0, "std": [0.229, 0.224, 0.225], "resize": None}
DEFAULT |= {"mean": [0.485, 0.456, 0.406], "ratio": [3 / 4, 4 / 3], "blur_sigma": [0.1, 2.0]}
BICUBIC = {"interpolation": "bicubic"}
MAE = {"crop": [0.2, 1.0], **BICUBIC}  # facebookresearch/mae, main_pretrain.py
# SimCLR, appendix A: distortion of strength 1 with probability 0.8, gray 0.2, blur 0.5
SIMCLR = {**BICUBIC, "color_jitter": [0.8, 0.8, 0.8, 0.2], "color_jitter_p": 0.8, "grayscale": 0.2, "blur": 0.5}
# facebookresearch/moco, --aug-plus
MOCO = {"crop": [0.2, 1.0], "color_jitter": [0.4, 0.4, 0.4, 0.1], "color_jitter_p": 0.8, "grayscale": 0.2, "blur": 0.5}
MOCO_1 = {"crop": [0.2, 1.0], "color_jitter": [0.4, 0.4, 0.4, 0.4], "color_jitter_p": 1.0, "grayscale": 0.2}
# BYOL, table 6: the two views differ in blur and solarization
BYOL_1 = {**BICUBIC, "color_jitter": [0.4, 0.4, 0.2, 0.1], "color_jitter_p": 0.8, "grayscale": 0.2, "blur": 1.0}
BYOL_2 = {**BYOL_1, "blur": 0.1, "solarize": 0.2}
SWAV = {**SIMCLR, "interpolation": "bilinear", "crop": [0.14, 1.0], "std": [0.228, 0.224, 0.225]}
SWAV_SMALL = {**SWAV, "size": 96, "crop": [0.05, 0.14]}
BEIT = {**BICUBIC, "color_jitter": [0.4, 0.4, 0.4, 0.0], "color_jitter_p": 1.0}
PAIR = {"view_1": BYOL_1, "view_2": BYOL_2}


def crops(large: float, first: float = 0.05, size: int = 96) -> dict[str, Any]:
    """DINO's global and local crops; the global ones start at this fraction, where the local ones end."""
    local = {**BYOL_1, "blur": 0.5, "size": size, "crop": [first, large]}
    return {"global_1": {**BYOL_1, "crop": [large, 1.0]}, "global_2": {**BYOL_2, "crop": [large, 1.0]}, "local": local}


# -- what is trained ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paper:
    """A source's values.

    Args:
        optimizer: its class, and `betas` or `momentum`.
        lr: the highest rate, as used.
        batch: images per step.
        epochs: of the run; none for a run of `steps`.
        warmup: epochs.
        start: fraction of the rate at which the warm-up starts.
        end: fraction at which a cosine ends; none for steps.
        steps: epochs at which the rate falls ...
        factor: ... by this factor.
        wd: weight decay at the start and at the end.
        vectors: whether biases and normalizations decay too.
        clip: greatest norm of the gradient.
        options: of the method.
        backbone: of the backbone.
        views: of the method.
        rules: parts of the rules by pattern.
        more: other options of the run.
        departs: words of FAITHFULNESS.md for what the recipe does otherwise.
    """

    optimizer: str
    lr: float
    batch: int
    epochs: float
    wd: float | tuple[float, float]
    vectors: bool
    warmup: float = 0.0
    start: float = 0.0
    end: float | None = 0.0
    steps: tuple[float, ...] = ()
    factor: float = 0.1
    stretch: float = 1.0
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    clip: float | None = None
    options: dict[str, Any] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    views: dict[str, dict[str, Any]] = field(default_factory=dict)
    rules: dict[str, dict[str, Any]] = field(default_factory=dict)
    more: dict[str, Any] = field(default_factory=dict)
    departs: tuple[str, ...] = ()

    def factor_at(self, epoch: float) -> float:
        """The rate's factor, by the formulas of the papers."""
        if epoch < self.warmup:
            return self.start + (1 - self.start) * epoch / self.warmup
        if self.end is None:
            return self.factor ** sum(epoch >= step for step in self.steps)
        done = (epoch - self.warmup) / (self.stretch * self.epochs - self.warmup)
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * done)) / 2


def resnet(zero_init: bool = False) -> dict[str, Any]:
    return {"class_path": "sslbook.nn.ResNet", "depth": 50, "width": 64, "zero_init_residual": zero_init}


def vit(dim: int = 768, depth: int = 12, heads: int = 12, **more: Any) -> dict[str, Any]:
    return {"dim": dim, "depth": depth, "num_heads": heads, "patch_size": 16, "positions": "sincos", **more}


SGD, LARS, ADAMW, ADAM = "torch.optim.SGD", "sslbook.optim.LARS", "torch.optim.AdamW", "torch.optim.Adam"
DECODER = {"decoder_dim": 512, "decoder_depth": 8, "decoder_num_heads": 16}
RELATIVE = {"positions": "relative", "layer_scale": 0.1, "drop_path": 0.1}
ZERO_INIT, PLAIN = resnet(True), resnet()

MAE_TRAIN = Paper(  # facebookresearch/mae, PRETRAIN.md: 1.5e-4 x batch / 256
    *(ADAMW, 2.4e-3, 4096, 800),
    wd=0.05,
    vectors=False,
    warmup=40,
    betas=(0.9, 0.95),
    options={"mask_ratio": 0.75, "norm_pix_loss": True, **DECODER},
    backbone=vit(),
    views={"view": MAE},
)
MOCO_TRAIN = Paper(  # facebookresearch/moco, main_moco.py --mlp --moco-t 0.2 --aug-plus --cos
    *(SGD, 0.03, 256, 200),
    wd=1e-4,
    vectors=True,
    options={"temperature": 0.2, "momentum": 0.999, "queue_size": 65536, "projector_dim": 128, "mlp": True},
    backbone=PLAIN,
    views={"view": MOCO},
)
BEIT_TRAIN = Paper(  # microsoft/unilm, beit/README.md; the rate ends at 1e-5
    *(ADAMW, 1.5e-3, 2048, 800),
    wd=0.05,
    vectors=False,
    warmup=10,
    end=1e-5 / 1.5e-3,
    clip=3.0,
    options={"num_masked": 75, "min_block": 16},
    backbone=vit(**RELATIVE),
    views={"view": BEIT},
    rules={"cls_token": {"weight_decay": 0.0}},
)
DINO_TRAIN = Paper(  # facebookresearch/dino, main_dino.py: 5e-4 x batch / 256, down to 1e-6
    *(ADAMW, 1e-3, 512, 100),
    wd=(0.04, 0.4),
    vectors=False,
    warmup=10,
    end=1e-6 / 1e-3,
    clip=3.0,
    options={
        **{"num_local": 8, "hidden_dim": 2048, "bottleneck_dim": 256, "num_outputs": 65536, "head_batch_norm": False},
        **{"student_temperature": 0.1, "teacher_temperature": 0.04, "teacher_temperature_start": 0.04},
        **{"center_momentum": 0.9, "momentum": 0.996, "freeze_last_layer": 1},
    },
    backbone=vit(384, 12, 6, positions="learned", drop_path=0.1),
    views=crops(0.4),
)
SIMMIM_TRAIN = Paper(  # microsoft/SimMIM, configs/swin_base__800ep: 1e-4 and a first 5e-7, both x batch / 512
    *(ADAMW, 4e-4, 2048, 800),
    wd=0.05,
    vectors=False,
    warmup=10,
    start=0.005,
    end=None,
    steps=(700,),
    clip=5.0,
    options={"mask_size": 32, "mask_ratio": 0.6},
    views={"view": {"size": 192, "crop": [0.67, 1.0]}},
    rules={"relative_position_bias_table": {"weight_decay": 0.0}},
)
SIMCLR_TRAIN = Paper(  # google-research/simclr, README and run.py: 0.3 x batch / 256
    *(LARS, 4.8, 4096, 100),
    wd=1e-4,
    vectors=False,
    warmup=10,
    options={"temperature": 0.1, "projector_num_layers": 3, "projector_dim": 128},
    backbone=ZERO_INIT,
    views={"view": SIMCLR},
)
SWAV_TRAIN = Paper(  # facebookresearch/swav, scripts/swav_800ep_pretrain.sh
    *(LARS, 4.8, 4096, 800),
    wd=1e-6,
    vectors=True,
    warmup=10,
    start=0.3 / 4.8,
    end=0.0048 / 4.8,
    options={
        **{"num_small": 6, "hidden_dim": 2048, "projector_dim": 128, "num_prototypes": 3000, "temperature": 0.1},
        **{"epsilon": 0.05, "sinkhorn_iterations": 3, "freeze_prototypes": "313 steps", "queue_size": 0},
    },
    backbone=PLAIN,
    views={"view": SWAV, "small_view": SWAV_SMALL},
)
MOCO_3_TRAIN = Paper(  # facebookresearch/moco-v3, CONFIG.md: 0.6 x batch / 256
    *(LARS, 9.6, 4096, 100),
    wd=1e-6,
    vectors=False,
    warmup=10,
    options={
        **{"hidden_dim": 4096, "projector_dim": 256, "projector_num_layers": 2, "predictor_batch_norm": False},
        **{"temperature": 1.0, "momentum": 0.99},
    },
    backbone=ZERO_INIT,
    views={k: {**v, "crop": [0.2, 1.0], "interpolation": "bilinear"} for k, v in PAIR.items()},
)
MOCO_3_VIT = replace(  # 1.5e-4 x batch / 256
    MOCO_3_TRAIN,
    **{"optimizer": ADAMW, "lr": 6e-4, "batch": 1024, "epochs": 300, "wd": 0.1, "vectors": True, "warmup": 40},
    options={
        **{"hidden_dim": 4096, "projector_dim": 256, "projector_num_layers": 3, "predictor_batch_norm": True},
        **{"temperature": 0.2, "momentum": 0.99, "freeze_patch_embedding": True},
    },
    backbone=vit(384, 12, 12),
    views={k: {**v, "crop": [0.08, 1.0], "interpolation": "bilinear"} for k, v in PAIR.items()},
)
SPARK_TRAIN = Paper(  # keyu-tian/SparK
    *(ADAMW, 2.4e-3, 4096, 1600),
    wd=(0.04, 0.2),
    vectors=False,
    warmup=40,
    start=0.005,
    end=0.001,
    betas=(0.9, 0.95),
    clip=5.0,
    options={"mask_ratio": 0.6, "decoder_dim": 768},
    backbone=ZERO_INIT,
    views={"view": {"crop": [0.67, 1.0], **BICUBIC}},
    departs=("AdamW stands in for LAMB, at MAE's rate", "drop path"),
)

PAPERS = {
    ("relative_location", "imagenet"): Paper(  # OpenMMLab, configs/selfsup/relative_loc
        *(SGD, 0.2, 512, 70),
        wd=1e-4,
        vectors=True,
        warmup=5,
        start=0.1,
        end=None,
        steps=(30, 50),
        options={"cell_size": 85, "patch_size": 64, "hidden_dim": 4096},
        backbone=PLAIN,
        views={"view": {"size": 255, "crop": [0.5, 0.75], "ratio": [1.0, 1.0], "flip": 0.0, "grayscale": 0.66}},
        rules={"head": {"weight_decay": 5e-4}},
        departs=("a crop of 50 to 75 % of the area",),
    ),
    ("rotation", "imagenet"): Paper(  # OpenMMLab, configs/selfsup/rotation_pred
        *(SGD, 0.2, 128, 70),
        wd=1e-4,
        vectors=True,
        warmup=5,
        start=0.1,
        end=None,
        steps=(30, 50),
        backbone=PLAIN,
        views={"view": {}},
    ),
    ("jigsaw", "imagenet"): Paper(  # facebookresearch/vissl, jigsaw_8gpu_resnet.yaml
        *(SGD, 0.1, 256, 105),
        wd=1e-4,
        vectors=False,
        warmup=5,
        start=0.25,
        end=None,
        steps=(30, 60, 90, 100),
        options={"num_permutations": 2000, "cell_size": 85, "patch_size": 64, "patch_dim": 1000},
        backbone=PLAIN,
        views={"view": {"size": 255, "crop": None, "grayscale": 0.66}},
        departs=("the view here resizes to 255",),
    ),
    ("colorization", "imagenet"): Paper(  # section 3: 3e-5, 1e-5, 3e-6
        *(ADAM, 3e-5, 40, 14),
        wd=1e-3,
        vectors=False,
        end=None,
        steps=(6, 12),
        factor=0.316,
        betas=(0.9, 0.99),
        options={"stride": 4, "bin_width": 10.0, "rebalance": 0.5},
        backbone=PLAIN,
        views={"view": {}},
        departs=("a ResNet-50 here instead of their network like VGG",),
    ),
    ("context_encoder", "imagenet"): Paper(
        *(ADAM, 1e-4, 256, 50),
        wd=0.0,
        vectors=False,
        end=None,
        options={"mask_ratio": 0.25, "overlap": 7, "overlap_weight": 10.0},
        backbone=PLAIN,
        views={"view": {"crop": [0.2, 1.0]}},
        departs=("more passes over the data than its 100,000 iterations",),
    ),
    ("exemplar", "imagenet"): Paper(
        *(SGD, 0.03, 256, 50),
        wd=1e-4,
        vectors=True,
        options={"num_exemplars": 32000},
        backbone=PLAIN,
        departs=("the paper has no ImageNet run",),
    ),
    ("npid", "imagenet"): Paper(  # zhirongw/lemniscate.pytorch, main.py
        *(SGD, 0.03, 256, 200),
        wd=1e-4,
        vectors=True,
        end=None,
        steps=(120, 160),
        options={"projector_dim": 128, "temperature": 0.07, "momentum": 0.5, "num_negatives": 4096},
        backbone=PLAIN,
        views={"view": MOCO_1},
    ),
    ("moco", "imagenet"): MOCO_TRAIN,
    ("moco", "imagenet_800"): replace(MOCO_TRAIN, epochs=800),
    ("moco", "imagenet_v1"): replace(
        MOCO_TRAIN,
        end=None,
        steps=(120, 160),
        options={"temperature": 0.07, "momentum": 0.999, "queue_size": 65536, "projector_dim": 128, "mlp": False},
        views={"view": MOCO_1},
    ),
    ("moco_v3", "imagenet"): MOCO_3_TRAIN,
    ("moco_v3", "imagenet_vit"): MOCO_3_VIT,
    ("moco_v3", "imagenet_vit_base"): replace(MOCO_3_VIT, lr=2.4e-3, batch=4096, backbone=vit()),
    (
        "pirl",
        "imagenet",
    ): Paper(  # facebookresearch/vissl, pirl_jigsaw_4node_resnet50.yaml: 0.12 at 1,024, ends at 0.00012
        *(SGD, 0.12, 1024, 800),
        wd=1e-4,
        vectors=False,
        end=0.001,
        options={"projector_dim": 128, "temperature": 0.07, "num_negatives": 32000, "momentum": 0.5},
        backbone=PLAIN,
    ),
    ("simclr", "imagenet"): SIMCLR_TRAIN,
    ("simclr", "imagenet_256"): replace(SIMCLR_TRAIN, lr=0.3, batch=256, epochs=200),
    ("nnclr", "imagenet"): Paper(  # section 4.1
        *(LARS, 4.8, 4096, 1000),
        wd=1e-6,
        vectors=False,
        warmup=10,
        options={
            "queue_size": 98304,
            "temperature": 0.1,
            "hidden_dim": 2048,
            "projector_dim": 256,
            "predictor_dim": 4096,
        },
        backbone=PLAIN,
        views=PAIR,
    ),
    ("densecl", "imagenet"): replace(
        MOCO_TRAIN,
        options={**{k: v for k, v in MOCO_TRAIN.options.items()}, "dense_weight": 0.5},
    ),
    ("interclr", "imagenet"): replace(
        MOCO_TRAIN,
        options={
            **{"num_clusters": 10000, "margin": -0.5, "intra_weight": 0.75, "inter_weight": 0.25},
            **{"num_negatives": 16384, "pool_size": 128000, "min_cluster": 20, "temperature": 0.2, "momentum": 0.999},
        },
    ),
    ("byol", "imagenet"): Paper(  # deepmind-research, byol/configs/byol.py, 1,000 epochs: 0.2 x batch / 256
        *(LARS, 3.2, 4096, 1000),
        wd=1.5e-6,
        vectors=False,
        warmup=10,
        options={"hidden_dim": 4096, "projector_dim": 256, "momentum": 0.996},
        backbone=ZERO_INIT,
        views=PAIR,
    ),
    ("simsiam", "imagenet"): Paper(  # facebookresearch/simsiam, main_simsiam.py: 0.05 x batch / 256
        *(SGD, 0.1, 512, 100),
        wd=1e-4,
        vectors=True,
        options={"hidden_dim": 2048, "projector_dim": 2048, "projector_num_layers": 3, "predictor_dim": 512},
        backbone=ZERO_INIT,
        views={"view": MOCO},
        rules={"^predictor": {"schedule": "Constant"}},
    ),
    ("barlow_twins", "imagenet"): Paper(  # facebookresearch/barlowtwins, main.py: 0.2 x batch / 256
        *(LARS, 1.6, 2048, 1000),
        wd=1e-6,
        vectors=False,
        warmup=10,
        end=0.001,
        options={"lambda_": 0.0051, "hidden_dim": 8192, "projector_dim": 8192, "projector_num_layers": 3},
        backbone=ZERO_INIT,
        views=PAIR,
        rules={"bias": {"lr_scale": 0.0015}},
        departs=("move by 1/16 of that",),
    ),
    ("vicreg", "imagenet"): Paper(  # facebookresearch/vicreg, main_vicreg.py: 0.2 x batch / 256
        *(LARS, 1.6, 2048, 1000),
        wd=1e-6,
        vectors=False,
        warmup=10,
        end=0.001,
        options={
            **{"invariance_weight": 25.0, "variance_weight": 25.0, "covariance_weight": 1.0},
            **{"hidden_dim": 8192, "projector_dim": 8192, "projector_num_layers": 3},
        },
        backbone=ZERO_INIT,
        views=PAIR,
    ),
    ("wmse", "imagenet"): Paper(  # htdt/self-supervised, README, ImageNet-100
        *(ADAM, 2e-3, 512, 240),
        wd=1e-6,
        vectors=True,
        warmup=500 / (IMAGES // 512),
        end=None,
        steps=(190, 215),
        factor=0.2,
        options={"num_views": 2, "hidden_dim": 1024, "projector_dim": 128, "slice_size": 256, "num_permutations": 1},
        backbone=PLAIN,
        views={"view": SIMCLR},
        departs=("on all of ImageNet and with a ResNet-50",),
    ),
    ("lejepa", "imagenet"): Paper(  # rbalestr-lab/lejepa, README
        *(ADAMW, 5e-4, 512, 100),
        wd=0.05,
        vectors=False,
        warmup=10,
        end=0.001,
        options={"num_global": 2, "num_local": 6, "lambda_": 0.05, "num_slices": 1024},
        backbone=vit(1024, 24, 16, patch_size=14),
        departs=("the batch and the length of the warm-up are our choice",),
    ),
    ("deepcluster", "imagenet"): Paper(  # facebookresearch/deepcluster, main.sh
        *(SGD, 0.05, 256, 200),
        wd=1e-5,
        vectors=True,
        end=None,
        options={"num_clusters": 10000, "pca_dim": 256, "sobel": True, "recluster_every": 1},
        backbone=PLAIN,
        views={"view": {}},
        rules={"^classifier": {"options": {"momentum": 0.0}}},
        departs=("SGD 0.05 and 256 images, here with a ResNet-50",),
    ),
    ("odc", "imagenet"): Paper(  # OpenSelfSup, configs/selfsup/odc
        *(SGD, 0.06, 512, 440),
        wd=1e-5,
        vectors=True,
        end=None,
        steps=(400,),
        factor=0.4,
        options={
            **{"hidden_dim": 512, "feature_dim": 256, "num_clusters": 10000, "momentum": 0.5, "min_cluster": 20},
            **{"centroids_every": 10},
        },
        backbone=PLAIN,
        views={"view": {"color_jitter": [0.4, 0.4, 1.0, 0.5], "color_jitter_p": 1.0, "grayscale": 0.2}},
        rules={"^classifier": {"options": {"momentum": 0.0}}},
        departs=("rotates every image by up to 2 degrees",),
    ),
    ("deepcluster_v2", "imagenet"): replace(
        SWAV_TRAIN,
        options={
            **{"num_small": 6, "hidden_dim": 2048, "projector_dim": 128, "num_prototypes": 3000, "num_heads": 3},
            **{"temperature": 0.1, "kmeans_iterations": 10},
        },
    ),
    ("swav", "imagenet"): SWAV_TRAIN,
    ("swav", "imagenet_256"): replace(
        SWAV_TRAIN,
        **{"lr": 0.6, "batch": 256, "epochs": 200, "warmup": 0, "end": 0.0006 / 0.6},
        options={
            **{"num_small": 6, "hidden_dim": 2048, "projector_dim": 128, "num_prototypes": 3000, "temperature": 0.1},
            **{"freeze_prototypes": "5005 steps", "queue_size": 3840, "queue_start": 15},
        },
    ),
    ("dino", "imagenet"): DINO_TRAIN,
    ("dino", "imagenet_resnet"): replace(  # 0.03 x batch / 256, down to 1e-6
        DINO_TRAIN,
        **{"optimizer": SGD, "lr": 0.06, "wd": 1e-4, "end": 1e-6 / 0.06, "backbone": PLAIN, "views": crops(0.14)},
    ),
    ("dino", "imagenet_vit_base"): replace(  # the published arguments: 7.5e-4 x batch / 256, down to 2e-6
        DINO_TRAIN,
        **{"lr": 3e-3, "batch": 1024, "epochs": 400, "end": 2e-6 / 3e-3, "views": crops(0.25)},
        backbone=vit(positions="learned", drop_path=0.1),
        options={
            "num_local": 10,
            "teacher_temperature": 0.07,
            "teacher_temperature_warmup": 50,
            "freeze_last_layer": 3,
        },
        departs=("the norm of the whole gradient is clipped at 3",),
    ),
    ("msn", "imagenet"): Paper(  # facebookresearch/msn, configs/pretrain/msn_vits16.yaml
        *(ADAMW, 1e-3, 1024, 800),
        wd=(0.04, 0.4),
        vectors=False,
        warmup=15,
        start=0.2,
        end=0.001,
        stretch=1.25,
        clip=3.0,
        options={
            **{"num_large": 1, "num_focal": 10, "patch_drop": 0.15, "hidden_dim": 2048, "output_dim": 256},
            **{"num_prototypes": 1024, "temperature": 0.1, "sharpening": 0.25, "mean_entropy_weight": 1.0},
            **{"sinkhorn_targets": True, "momentum": 0.996},
        },
        backbone=vit(384, 12, 6, positions="learned"),
        views={"large": {**MOCO, "crop": [0.3, 1.0]}, "focal": {**MOCO, "size": 96, "crop": [0.05, 0.3]}},
        rules={"^prototypes": {"weight_decay": 0.0}},
    ),
    ("ibot", "imagenet"): replace(  # bytedance/ibot: 5e-4 x batch / 256, down to 1e-6
        DINO_TRAIN,
        **{"lr": 2e-3, "batch": 1024, "epochs": 800, "end": 1e-6 / 2e-3, "views": crops(0.25)},
        options={
            **{
                "num_local": 10,
                "hidden_dim": 2048,
                "bottleneck_dim": 256,
                "num_outputs": 8192,
                "separate_heads": False,
            },
            **{"mask_probability": 0.5, "mask_ratio": [0.1, 0.5], "cls_weight": 1.0, "patch_weight": 1.0},
            **{"koleo_weight": 0.0, "teacher_temperature": 0.07, "teacher_temperature_start": 0.04},
            **{"teacher_temperature_warmup": 30, "momentum": 0.996, "freeze_last_layer": 1},
        },
    ),
    ("ibot", "dinov2"): replace(  # facebookresearch/dinov2, vitl16_short.yaml: 0.004 x sqrt(batch / 1024), down to 1e-6
        DINO_TRAIN,
        **{"lr": 0.004 * 2**0.5, "batch": 2048, "epochs": 125_000 / (IMAGES // 2048), "end": 1e-6 / 0.004 / 2**0.5},
        warmup=12_500 / (IMAGES // 2048),
        options={
            **{"num_local": 8, "num_outputs": 65536, "mask_probability": 0.5, "mask_ratio": [0.1, 0.5]},
            **{"koleo_weight": 0.1, "teacher_temperature": 0.07, "teacher_temperature_start": 0.04},
            **{"teacher_temperature_warmup": "37500 steps", "momentum": 0.992, "freeze_last_layer": "1250 steps"},
        },
        backbone=vit(1024, 24, 16, positions="learned", drop_path=0.3, layer_scale=1e-5, drop_path_uniform=True),
        views=crops(0.32),
        rules={"patch_embed": {"lr_scale": 0.2}},
        more={"layer_decay": 0.9, "steps": 125_000},
        departs=("clip over the whole gradient",),
    ),
    (
        "data2vec",
        "imagenet",
    ): Paper(  # facebookresearch/data2vec_vision, beit/README.md; --ema_start_at 0: always 0.9998
        *(ADAMW, 2e-3, 2048, 800),
        wd=0.05,
        vectors=False,
        warmup=10,
        end=1e-5 / 2e-3,
        clip=3.0,
        options={
            **{"mask_ratio": 120 / 196, "min_block": 16, "num_top_layers": 6, "normalize_layers": True},
            **{"normalize_targets": True, "beta": 2.0, "momentum": 0.9998, "momentum_end": 0.9998},
        },
        backbone=vit(positions="relative", layer_scale=1e-4, drop_path=0.25),
        views={"view": BEIT},
        rules={"cls_token": {"weight_decay": 0.0}},
        departs=("Attention has no dropout",),
    ),
    ("ijepa", "imagenet"): Paper(  # facebookresearch/ijepa, configs/in1k_vith14_ep300.yaml
        *(ADAMW, 1e-3, 2048, 300),
        wd=(0.04, 0.4),
        vectors=False,
        warmup=40,
        start=0.2,
        end=0.001,
        options={
            **{"num_targets": 4, "target_scale": [0.15, 0.2], "target_aspect": [0.75, 1.5]},
            **{"context_scale": [0.85, 1.0], "predictor_dim": 384, "predictor_depth": 12, "momentum": 0.996},
        },
        backbone={"class_path": "sslbook.nn.vit_huge", "patch_size": 14},
        views={"view": {"crop": [0.3, 1.0], "flip": 0.0}},
    ),
    ("dvae", "imagenet"): Paper(
        *(ADAMW, 1e-4, 512, 20),
        wd=1e-4,
        vectors=False,
        warmup=1.0,
        options={"temperature": 1.0, "last_temperature": 1 / 16},
        backbone={"num_codes": 8192},
        departs=("rate, batch and length are ours",),
    ),
    ("beit", "imagenet"): BEIT_TRAIN,
    ("beit", "imagenet_large"): replace(BEIT_TRAIN, backbone=vit(1024, 24, 16, **{**RELATIVE, "layer_scale": 1e-5})),
    ("vqkd", "imagenet"): Paper(  # microsoft/unilm, beit2/TOKENIZER.md: 5e-5 x batch / 128
        *(ADAMW, 2e-4, 512, 100),
        wd=1e-4,
        vectors=False,
        warmup=10,
        end=0.05,
        betas=(0.9, 0.99),
        options={"momentum": 0.99, "decoder_dim": 768, "decoder_depth": 3},
        backbone={"num_codes": 8192, "code_dim": 32},
        rules={"cls_token": {"weight_decay": 0.0}},
        departs=("Any frozen network can be the teacher",),
    ),
    ("beit_v2", "imagenet"): replace(
        BEIT_TRAIN,
        **{"epochs": 300, "betas": (0.9, 0.98), "views": {"view": {**BEIT, "crop": [0.2, 1.0]}}},
        options={"num_masked": 75, "min_block": 16, "early_layer": 9, "aggregation_depth": 2},
        backbone=vit(**{**RELATIVE, "drop_path": 0.0}),
    ),
    ("cae", "imagenet"): replace(
        BEIT_TRAIN,
        epochs=300,
        options={"num_masked": 98, "alignment_weight": 2.0, "regressor_depth": 4, "decoder_depth": 4},
        backbone=vit(layer_scale=0.1, drop_path=0.1),
        views={"view": BICUBIC},
    ),
    ("mae", "imagenet"): MAE_TRAIN,
    ("mae", "imagenet_1600"): replace(MAE_TRAIN, epochs=1600),
    ("mae", "imagenet_large"): replace(MAE_TRAIN, epochs=1600, backbone={"class_path": "sslbook.nn.vit_large"}),
    ("mae", "imagenet_huge"): replace(MAE_TRAIN, epochs=1600, backbone={"class_path": "sslbook.nn.vit_huge"}),
    ("simmim", "imagenet"): SIMMIM_TRAIN,
    ("simmim", "imagenet_100"): replace(  # 2e-4, a first 1e-6 and a last 1e-5, all x batch / 512
        SIMMIM_TRAIN, **{"lr": 8e-4, "epochs": 100, "steps": (), "end": 1e-5 / 2e-4}
    ),
    ("simmim", "imagenet_vit"): replace(
        SIMMIM_TRAIN,
        backbone=vit(**RELATIVE),
        views={"view": {"crop": [0.67, 1.0]}},
        rules={"cls_token": {"weight_decay": 0.0}},
    ),
    ("maskfeat", "imagenet"): Paper(  # SlowFast, in1k_VIT_B_MaskFeat_PT.yaml: 2e-4, 1e-6 and 1e-6, all x batch / 256
        *(ADAMW, 1.6e-3, 2048, 300),
        wd=0.05,
        vectors=False,
        warmup=30,
        start=0.005,
        end=0.005,
        clip=0.02,
        options={"mask_ratio": 0.4, "cell_size": 8},
        backbone=vit(positions="learned"),
        views={"view": {**MAE, "crop": [0.5, 1.0]}},
    ),
    ("pixmim", "imagenet"): replace(
        MAE_TRAIN,
        options={"radius": 40.0, "shift": 4.0, **MAE_TRAIN.options},
        views={"view": {**BICUBIC, "crop": None}},
        departs=("The view crops the middle of the longer side",),
    ),
    ("mff", "imagenet"): replace(
        MAE_TRAIN,
        epochs=300,
        options={"layers": [0, 2, 4, 6, 8], **MAE_TRAIN.options},
        departs=("Images are cropped as in MAE",),
    ),
    ("milan", "imagenet"): replace(MAE_TRAIN, epochs=400, options={"mask_ratio": 0.75, **DECODER}),
    ("eva", "imagenet"): replace(  # baaivision/EVA, its values for ViT-g/14
        MAE_TRAIN,
        **{"lr": 1e-3, "epochs": 150, "warmup": 2, "end": 0.01, "betas": (0.9, 0.98), "clip": 3.0},
        options={"mask_ratio": 0.41},
        backbone=vit(positions="learned", drop_path=0.1),
        rules={"pos_embed": {"weight_decay": 0.0}},
        departs=("here it is ImageNet-1k",),
    ),
    ("mixmim", "imagenet"): replace(
        MAE_TRAIN,
        **{"lr": 1.2e-3, "batch": 2048, "epochs": 300},
        options={"mask_ratio": 0.5, "norm_pix_loss": True, **DECODER},
        departs=("a ViT-B/16 instead of a Swin-like network",),
    ),
    ("spark", "imagenet"): SPARK_TRAIN,
    ("spark", "imagenet_convnext"): replace(SPARK_TRAIN, backbone={"name": "convnext_small"}),
}
recipes = pytest.mark.parametrize(("method", "recipe"), PAPERS)

# -- what our recipes resolve to ----------------------------------------------------------------------------------------


def completed(cls: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments for a class, and its defaults where they are not given; a view is given in part."""
    arguments: dict[str, Any] = {}
    for owner in reversed(inspect.getmro(cls) if inspect.isclass(cls) else [cls]):
        for name, parameter in inspect.signature(owner).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                arguments[name] = parameter.default
    for name, default in list(arguments.items()):
        if isinstance(default, View):
            arguments[name] = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(default).items()}
            arguments[name] |= given.get(name) or {}
        elif name in given:
            arguments[name] = given[name]
        elif isinstance(default, tuple):
            arguments[name] = list(default)
    return {**{key: value for key, value in given.items() if key not in arguments}, **arguments}


def find(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


@cache
def resolved(method: str, recipe: str) -> dict[str, Any]:
    """The recipe upon its base upon the constructors' defaults, as the command has it, but a hundred times faster."""
    cls = load(method)
    names = {name for owner in cls.__mro__ for name in inspect.signature(owner.__init__).parameters}
    values = read_recipe(RECIPES / method / f"{recipe}.yaml", names)
    options = completed(cls, values.get("method", {}))
    for spec in (options["backbone"], values["optimizer"]):
        spec["init_args"] = completed(find(spec["class_path"]), spec.get("init_args", {}))
    rules = [{**ParamRule("").__dict__, **rule} for rule in values.get("rules", [])]
    constant = {"class_path": "sslbook.schedules.Constant"}
    values = {**completed(pretrain, values), "schedule": values.get("schedule") or constant}
    return {**values, "method": {"init_args": options}, "rules": rules}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "recipe"), [("npid", "imagenet"), ("simmim", "imagenet_100")])
def test_the_command_resolves_a_recipe_to_the_same(method: str, recipe: str) -> None:
    ours, theirs = resolved(method, recipe), resolve([method, "--recipe", recipe], pretrain)[2]
    assert theirs["method"]["init_args"] == ours["method"]["init_args"]
    for key in ("batch_size", "epochs", "base_batch_size", "decay_bias_and_norm", "clip_grad_norm"):
        assert theirs[key] == ours[key]
    for step in (0, 3, 60, 99):  # a schedule gets none of the arguments of the one that it replaces
        assert build(theirs["schedule"])(Clock(step, 100)) == build(ours["schedule"])(Clock(step, 100))
    assert theirs["optimizer"]["init_args"]["lr"] == ours["optimizer"]["init_args"]["lr"]


def build(spec: dict[str, Any]) -> Any:
    """The object that `class_path` and `init_args` describe."""
    arguments = {
        key: build(value) if isinstance(value, dict) and "class_path" in value else value
        for key, value in spec.get("init_args", {}).items()
    }
    return find(spec["class_path"])(**arguments)


def test_every_recipe_for_imagenet_has_its_values_here() -> None:
    published = {(path.parent.name, path.stem) for path in RECIPES.glob("*/*.yaml") if path.parent.name != "protocols"}
    assert {key for key in published if key[1].startswith(("imagenet", "dinov2"))} == set(PAPERS)


@recipes
def test_rate_batch_and_decay_are_those_of_the_source(method: str, recipe: str) -> None:
    paper, got = PAPERS[method, recipe], resolved(method, recipe)
    optimizer = got["optimizer"]["init_args"]
    assert got["optimizer"]["class_path"] == paper.optimizer
    assert got["batch_size"] == paper.batch
    scale = paper.batch / got["base_batch_size"] if got["base_batch_size"] else 1.0
    assert optimizer["lr"] * scale == pytest.approx(paper.lr, rel=1e-3)
    assert got["decay_bias_and_norm"] == paper.vectors
    assert got["clip_grad_norm"] == paper.clip
    if "betas" in optimizer:
        assert tuple(optimizer["betas"]) == paper.betas
    else:
        assert optimizer["momentum"] == paper.momentum
        assert not optimizer.get("nesterov", False)

    spe = IMAGES // paper.batch
    total = got["steps"] or round(got["epochs"] * spe)
    assert total == pytest.approx(paper.epochs * spe, abs=1)
    schedule = build(got["schedule"])
    marks = {0.0, paper.warmup / 2, paper.warmup, *paper.steps, *(0.999 * s for s in paper.steps), paper.epochs}
    for epoch in sorted({*marks, (paper.warmup + paper.epochs) / 2, 0.9 * paper.epochs}):
        step = math.ceil(epoch * spe)
        factor = schedule(Clock(step, total, spe))
        assert factor == pytest.approx(paper.factor_at(step / spe), rel=0.01, abs=2e-5), f"epoch {epoch}"

    first, last = paper.wd if isinstance(paper.wd, tuple) else (paper.wd, paper.wd)
    course = build(got["weight_decay_schedule"]) if got["weight_decay_schedule"] else lambda clock: 1.0
    end = (1 + math.cos(math.pi / paper.stretch)) / 2  # MSN stops its cosine early
    decay = [optimizer["weight_decay"] * course(Clock(step, total, spe)) for step in (0, total)]
    assert decay == pytest.approx([first, last + (first - last) * end], rel=1e-3)


@recipes
def test_options_and_backbone_are_those_of_the_source(method: str, recipe: str) -> None:
    paper, got = PAPERS[method, recipe], resolved(method, recipe)
    options = got["method"]["init_args"]
    assert {key: options.get(key) for key in paper.options} == paper.options
    backbone = {"class_path": options["backbone"]["class_path"], **options["backbone"]["init_args"]}
    if backbone["class_path"].startswith("sslbook.nn.vit_"):  # a named size: its class holds the numbers
        with torch.device("meta"):
            network = build(options["backbone"])
        sizes = {"dim": network.dim, "depth": len(network.blocks), "num_heads": network.blocks[0].attn.num_heads}
        backbone = {**sizes, "positions": "sincos", **backbone, "patch_size": network.patch_size}
    assert {key: backbone.get(key) for key in paper.backbone} == paper.backbone
    for pattern, wanted in paper.rules.items():
        (rule,) = [rule for rule in got["rules"] if pattern in rule["pattern"]]
        for key, value in wanted.items():
            ours = rule[key]
            assert (ours["class_path"].rpartition(".")[2] if key == "schedule" else ours) == value
    assert bool(got["rules"]) == bool(paper.rules)
    assert {key: got[key] for key in paper.more} == paper.more
    assert paper.more.get("layer_decay") == got["layer_decay"]


@recipes
def test_views_are_those_of_the_source(method: str, recipe: str) -> None:
    options = resolved(method, recipe)["method"]["init_args"]
    names = {field.name for field in fields(View)}
    for view, wanted in PAPERS[method, recipe].views.items():
        wanted = {**DEFAULT, **wanted}
        if not any(wanted["color_jitter"]):
            wanted["color_jitter_p"] = options[view]["color_jitter_p"]  # without jitter its probability means nothing
        assert options[view].keys() == names
        for key, value in wanted.items():
            assert options[view][key] == (pytest.approx(value) if isinstance(value, list) else value), f"{view}.{key}"


@recipes
def test_departures_are_named(method: str, recipe: str) -> None:
    text = " ".join(FAITHFULNESS.read_text(encoding="utf-8").split())
    for words in PAPERS[method, recipe].departs:
        assert words in text


def test_all_train_in_bf16_and_say_so() -> None:
    text = FAITHFULNESS.read_text(encoding="utf-8")
    assert "They train in bf16" in text
    assert {resolved(*key)["precision"] for key in PAPERS} == {"bf16"}
