"""VQ-KD: learn a codebook from which a frozen teacher's features can be reconstructed, the targets of BEiT v2.

A transformer projects every patch to a unit vector of few dimensions, the nearest code replaces it, and a small decoder
reconstructs the teacher's features from the codes alone. The codes are an online k-means: each is the moving average of
the patches assigned to it.

Peng, Dong, Bao, Ye and Wei, 2022, "BEiT v2: masked image modeling with vector-quantized visual tokenizers"
(arXiv:2208.06366), section 3.1 and equation 1. Values are those of the authors' code, whose commitment term is a mean
over dimensions.

What differs from the authors' code (microsoft/unilm, 80d673a):
- They initialize the codes by k-means on the first batch and leave a code that is never assigned where it is; here
  codes start at patches of the first batch, and one that is hardly assigned moves to a patch of the latest batch (the
  random restarts of Dhariwal et al., 2020, "Jukebox", arXiv:2005.00341, section 3.1).
- Any frozen network can be the teacher; of CLIP the targets are the features after the last norm, 768 for ViT-B/16,
  where the authors reconstruct the 512 that CLIP's projection makes of them: another tokenizer, and so another BEiT v2.
- Encoder and decoder have sine-cosine positions and the decoder no class token; there positions are learned, and both
  have a class token.
- Images are normalized by the view's mean and standard deviation, which are ImageNet's by default; there both are 0.5.
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
from sslbook.nn.precision import full_precision
from sslbook.nn.tokenizers import VQTokenizer
from sslbook.nn.vit import Block, init_transformer, sincos_positions
from sslbook.schedules import Clock
from sslbook.types import PositiveInt
from sslbook.weights.teachers import open_teacher


def cosine_loss(prediction: Float[Tensor, "rows dim"], target: Float[Tensor, "rows dim"]) -> Float[Tensor, ""]:
    """Equation 1, first term: 1 - cos, the mean over patches."""
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=1).mean()


def moved_codes(
    codebook: Float[Tensor, "codes dim"],
    counts: Float[Tensor, "num_codes"],
    sums: Float[Tensor, "codes dim"],
    momentum: float,
) -> Float[Tensor, "codes dim"]:
    """The codebook after an EMA step: each assigned code moves towards the mean of its patches, then is normalized."""
    moved = F.normalize(momentum * codebook + (1 - momentum) * F.normalize(sums, dim=1), dim=1)
    return torch.where(counts[:, None] > 0, moved, codebook)


class Decoder(nn.Module):
    """A few transformer blocks from codes to the teacher's features."""

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
        teacher: the frozen network whose features are reconstructed: a run folder or exported backbone, timm/NAME, or a
            module. The paper's is timm/vit_base_patch16_clip_quickgelu_224.openai.
        view: augmentation of an image.
        momentum: EMA momentum of the codes.
        commitment_weight: weight of the commitment loss, the distance of patches from their codes.
        dead_below: a code assigned less often than this fraction of the average moves to a patch; 0: never.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
        teacher_size: side in pixels of the teacher's images, so that its grid of patches is the tokenizer's; null
            leaves them as they are.

    Raises:
        UserError: the backbone is no VQTokenizer, the view has another size, or there is no teacher of the same grid.
    """

    rgb_only = True

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
        commitment_weight: float = 1.0,
        dead_below: float = 0.03,
        decoder_dim: PositiveInt = 768,
        decoder_depth: int = 3,
        decoder_num_heads: PositiveInt = 12,
        teacher_size: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, VQTokenizer):
            raise UserError(
                f"VQ-KD trains a network with a codebook and cannot use a {type(backbone).__name__}: "
                "choose sslbook.nn.VQTokenizer"
            )
        size = backbone.grid[0] * backbone.patch_size
        if view.size != size:
            raise UserError(
                f"the tokenizer is made for images of {size} pixels and the view gives {view.size}: make them equal"
            )
        self.view, self.momentum, self.dead_below = view, momentum, dead_below
        self.commitment_weight = commitment_weight
        self.backbone = backbone
        self.teacher = open_teacher(teacher, view, teacher_size)
        self.teacher.require_grid(backbone.grid)
        self.decoder = Decoder(
            backbone.code_dim, decoder_dim, decoder_depth, decoder_num_heads, self.teacher.dim, backbone.grid
        )
        num_codes, code_dim = backbone.codebook.shape
        self.register_buffer("usage", torch.ones(num_codes))  # moving average of counts / their mean
        self.register_buffer("counts", torch.zeros(num_codes))  # patches assigned to each code since the last step
        self.register_buffer("sums", torch.zeros(num_codes, code_dim))  # sums of their latents
        self.register_buffer("spare", torch.zeros(num_codes, code_dim))  # a random patch for each code, if it is dead
        self.register_buffer("started", torch.tensor(0))  # 1 once the codes are initialized

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def on_weights_loaded(self, taken: list[str]) -> None:
        if "backbone.codebook" in taken:
            self.started.fill_(1)

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        target = self.teacher(images).patches  # (n, patches, teacher_dim), without gradient
        latents = self.backbone.latents(images)  # unit vectors: (n, patches, code_dim)
        with full_precision(latents):
            tokens = self.backbone.nearest(latents)  # (n, patches)
            codes = self.backbone.codebook[tokens]
        # Straight-through estimator: the value is the code's, its gradient passes to the latent.
        quantized = latents + (codes - latents).detach()
        reconstruction = self.decoder(quantized)
        reconstruction_loss = cosine_loss(reconstruction.flatten(0, 1), target.flatten(0, 1))
        # Commitment: moves the latents to their codes. The codes have no gradient, they follow by EMA in `after_step`.
        commitment_loss = (latents - codes.detach()).square().mean()
        self._accumulate(latents.detach(), tokens, clock)
        share = self.counts / self.counts.sum()
        return {
            "loss": reconstruction_loss + self.commitment_weight * commitment_loss,  # equation 1
            "cosine_loss": reconstruction_loss.detach(),
            "code_perplexity": torch.special.entr(share).sum().exp(),
        }

    @torch.no_grad()
    def _accumulate(
        self, latents: Float[Tensor, "batch patches code_dim"], tokens: Int[Tensor, "batch patches"], clock: Clock
    ) -> None:
        """Add the patches assigned to each code, over all processes and all parts of an accumulated batch."""
        latent, token = latents.flatten(0, 1), tokens.flatten()
        counts = torch.zeros_like(self.counts).index_add_(0, token, torch.ones_like(latent[:, 0]))
        sums = torch.zeros_like(self.sums).index_add_(0, token, latent)
        self.counts.add_(distributed.all_reduce_sum(counts))
        self.sums.add_(distributed.all_reduce_sum(sums))
        everywhere = distributed.all_gather(latent)
        code = torch.arange(len(self.spare), device=latent.device)
        u = rng.uniform(clock.seed, clock.step, code, rng.METHOD, 1)[:, 0]
        self.spare.copy_(everywhere[(u * len(everywhere)).long()])

    @torch.no_grad()
    def after_step(self, clock: Clock) -> None:
        codebook = self.backbone.codebook
        if self.started:
            codebook.copy_(moved_codes(codebook, self.counts, self.sums, self.momentum))
        else:
            codebook.copy_(self.spare)
            self.started.fill_(1)
        self.usage.mul_(self.momentum).add_(self.counts / self.counts.mean().clamp_min(1e-12), alpha=1 - self.momentum)
        dead = self.usage < self.dead_below
        codebook[dead] = self.spare[dead]
        self.usage[dead] = 1.0  # a restarted code has time to be assigned before it counts as dead again
        self.counts.zero_()
        self.sums.zero_()
