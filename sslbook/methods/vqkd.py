"""VQ-KD: learn a vocabulary whose words mean what a teacher sees, for BEiT v2 to predict.

A transformer maps every patch to a sphere of few dimensions, where the nearest of many codes stands for it, and a small
decoder reconstructs a frozen teacher's features from the codes alone. The codes are k-means, run along with the training
as moving averages: each moves towards the patches that chose it.

Peng, Dong, Bao, Ye and Wei, 2022, "BEiT v2: masked image modeling with vector-quantized visual tokenizers"
(arXiv:2208.06366), section 3.1 and equation 1; values are those of the authors' code, whose commitment term is a mean
over dimensions. What differs: the authors start the codes by k-means on the first batch and leave a code that is never chosen
where it is; here the codes start at patches of the first batch, and one that is hardly chosen moves to a patch of the
latest (the random restarts of Dhariwal et al., 2020, "Jukebox", arXiv:2005.00341, section 3.1). Any frozen network can
teach.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import distributed, rng
from sslbook.data.loader import Batch
from sslbook.data.views import RANDOM_CROP, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn.teachers import Teacher
from sslbook.nn.tokenizers import VQTokenizer
from sslbook.nn.vit import Block, init_transformer, sincos_positions
from sslbook.schedules import Clock


def cosine_loss(said: Float[Tensor, "rows dim"], target: Float[Tensor, "rows dim"]) -> Float[Tensor, ""]:
    """Equation 1, first term: 1 - cos, averaged over patches."""
    return 1 - F.cosine_similarity(said.float(), target.float(), dim=1).mean()


def moved_codes(
    codebook: Float[Tensor, "codes dim"],
    counts: Float[Tensor, "num_codes"],
    sums: Float[Tensor, "codes dim"],
    momentum: float,
) -> Float[Tensor, "codes dim"]:
    """Every code that was chosen moves towards the mean of the places that chose it, and back onto the sphere."""
    moved = F.normalize(momentum * codebook + (1 - momentum) * F.normalize(sums, dim=1), dim=1)
    return torch.where(counts[:, None] > 0, moved, codebook)


class Decoder(nn.Module):
    """A few blocks from codes to the teacher's features."""

    def __init__(
        self, code_dim: int, dim: int, depth: int, num_heads: int, out_dim: int, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(code_dim, dim)
        self.register_buffer("positions", sincos_positions(dim, *grid))
        self.blocks = nn.Sequential(*[Block(dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, out_dim))
        init_transformer(self)

    def forward(self, codes: Float[Tensor, "batch patches code_dim"]) -> Float[Tensor, "batch patches out_dim"]:
        return self.predict(self.norm(self.blocks(self.embed(codes) + self.positions)))


class VQKD(Method):
    """Vector-quantized knowledge distillation (arXiv:2208.06366).

    Args:
        backbone: the tokenizer to train, a sslbook.nn.VQTokenizer.
        teacher: the frozen network whose features are reconstructed: a run folder or exported backbone, timm/NAME,
            open_clip/NAME:WEIGHTS, transformers/NAME, or a module. The paper's is open_clip/ViT-B-16:openai.
        view: what an image becomes.
        momentum: how much of itself a code keeps at a step.
        commitment: how much the distance of patches from their codes counts.
        dead_below: a code chosen less often than this part of the average moves to a patch of the batch; 0 for never.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
        teacher_size: side of the images that the teacher gets, where its patches must be brought to the student's
            grid; null leaves them as they are.
    """

    backbone: VQTokenizer  # pyrefly: ignore[bad-override-mutable-attribute]
    usage: Tensor
    counts: Tensor
    sums: Tensor
    spare: Tensor
    started: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        teacher: nn.Module | str | None = None,
        view: View = RANDOM_CROP,
        momentum: float = 0.99,
        commitment: float = 1.0,
        dead_below: float = 0.03,
        decoder_dim: int = 768,
        decoder_depth: int = 3,
        decoder_num_heads: int = 12,
        teacher_size: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, VQTokenizer):
            raise UserError(
                f"VQ-KD trains a network with a codebook and cannot use a {type(backbone).__name__}: "
                "choose sslbook.nn.VQTokenizer"
            )
        if view.size != backbone.grid[0] * backbone.patch_size:
            size = backbone.grid[0] * backbone.patch_size
            raise UserError(
                f"the tokenizer is made for images of {size} pixels and the view gives {view.size}: make them alike"
            )
        self.view, self.momentum, self.commitment, self.dead_below = view, momentum, commitment, dead_below
        self.backbone = backbone
        self.teacher = Teacher(teacher, view, teacher_size)
        self.teacher.require_grid(backbone.grid)
        self.decoder = Decoder(
            backbone.code_dim, decoder_dim, decoder_depth, decoder_num_heads, self.teacher.dim, backbone.grid
        )
        self.register_buffer("usage", torch.ones(backbone.num_codes))
        self.register_buffer("counts", torch.zeros(backbone.num_codes))
        self.register_buffer("sums", torch.zeros(backbone.num_codes, backbone.code_dim))
        self.register_buffer("spare", torch.zeros(backbone.num_codes, backbone.code_dim))
        self.register_buffer("started", torch.tensor(0))  # 1 once the codes lie where images are

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def on_weights_loaded(self, taken: list[str]) -> None:
        if "backbone.codebook" in taken:
            self.started.fill_(1)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        target = self.teacher(images).patches
        places = self.backbone.latents(images)
        with torch.autocast(images.device.type, enabled=False):
            tokens = self.backbone.nearest(places)
            codes = self.backbone.codebook[tokens]
        straight = places + (codes - places).detach()  # the gradient of the code passes to the place
        said = self.decoder(straight)
        alike = cosine_loss(said.flatten(0, 1), target.flatten(0, 1))
        distance = (places - codes.detach()).square().mean()
        self._note(places.detach(), tokens, clock)
        share = self.counts / self.counts.sum()
        return {
            "loss": alike + self.commitment * distance,
            "cosine_loss": alike.detach(),
            "code_perplexity": torch.special.entr(share).sum().exp(),
        }

    @torch.no_grad()
    def _note(
        self, places: Float[Tensor, "batch patches code_dim"], tokens: Int[Tensor, "batch patches"], clock: Clock
    ) -> None:
        """Adds up, over all processes and parts of the batch, what every code was chosen for."""
        place, token = places.flatten(0, 1), tokens.flatten()
        count = torch.zeros_like(self.counts).index_add_(0, token, torch.ones_like(place[:, 0]))
        total = torch.zeros_like(self.sums).index_add_(0, token, place)
        self.counts.add_(distributed.all_reduce_sum(count))
        self.sums.add_(distributed.all_reduce_sum(total))
        everywhere = distributed.all_gather(place)
        code = torch.arange(len(self.spare), device=place.device)
        u = rng.uniform(clock.seed, clock.step, code, rng.METHOD, 1)[:, 0]
        self.spare.copy_(everywhere[(u * len(everywhere)).long()])

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        if not self.started:
            self.backbone.codebook.copy_(self.spare)
            self.started.fill_(1)
        else:
            codes = moved_codes(self.backbone.codebook, self.counts, self.sums, self.momentum)
            self.backbone.codebook.copy_(codes)
        average = self.counts.mean()
        self.usage.mul_(self.momentum).add_(self.counts / average.clamp_min(1e-12), alpha=1 - self.momentum)
        dead = self.usage < self.dead_below
        self.backbone.codebook[dead] = self.spare[dead]
        self.usage[dead] = 1.0  # a chance to be chosen, before it is judged again
        self.counts.zero_()
        self.sums.zero_()
