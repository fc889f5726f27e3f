"""MILAN: predict a frozen CLIP's features of all patches from a quarter of them, chosen by the teacher's attention.

The targets are features of a teacher trained on images and captions, not pixels. Patches that the teacher attends to
are more likely to stay visible. The decoder predicts masked patches and leaves the encoded visible ones as they are, so
that these must be good features by themselves.

Hou, Sun, Chen, Xie and Kung, 2022, "MILAN: Masked image pretraining on language assisted representation"
(arXiv:2208.06049): section 3.2 the targets and the loss, 3.3 the prompting decoder, 3.4 semantic aware masking. As in
the authors' code the loss is over visible and masked patches, and the class token where the teacher has one.

What differs from the authors' code (zejiangh/MILAN, 7dcfe0f):
- The targets are CLIP's features after the last norm, 768 for ViT-B/16, where the authors predict the 512 that CLIP's
  projection to the space of captions makes of them; the paper's figures are for those.
- Any frozen network can be the teacher; where it has no class token, a patch's attention is its contribution to the
  mean feature.
- Visible patches are sampled by counter-based random numbers of seed, epoch and image; theirs by torch's generator.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import rng
from sslbook.data.loader import Batch
from sslbook.data.masks import require_mask
from sslbook.data.views import MAE_CROP, View
from sslbook.methods.base import Method
from sslbook.nn.mask_tokens import gather_tokens
from sslbook.nn.teachers import TeacherFeatures
from sslbook.nn.vit import (
    FeedForward,
    VisionTransformer,
    init_transformer,
    patch_grid,
    require_heads,
    require_transformer,
    sincos_positions,
)
from sslbook.schedules import Clock
from sslbook.types import PositiveInt
from sslbook.weights.teachers import open_teacher


def cosine_loss(prediction: Float[Tensor, "*rows dim"], target: Float[Tensor, "*rows dim"]) -> Float[Tensor, ""]:
    """Squared distance of the normalized features, 2 - 2 cos, the mean over rows (section 3.2)."""
    return (2 - 2 * F.cosine_similarity(prediction.float(), target.float(), dim=-1)).mean()


def semantic_order(
    attention: Float[Tensor, "batch patches"], index: Int[Tensor, "batch"], clock: Clock
) -> Int[Tensor, "batch patches"]:
    """All patches in random order, sampled without replacement with probabilities in proportion to their attention.

    Uniform numbers' logarithms, divided by the weights and sorted, are such a sample (Efraimidis and Spirakis, 2006).
    """
    u = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD, attention.shape[1]).double()
    key = u.clamp_min(2.0**-26).log() / attention.double()  # minus infinity without attention: the last
    return key.argsort(dim=1, descending=True, stable=True)


class PromptBlock(nn.Module):
    """A transformer block in which only the mask tokens are updated: they attend to themselves and to the prompts."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        require_heads(dim, num_heads)
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.q, self.kv, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = FeedForward(dim, 4 * dim)

    def forward(
        self, x: Float[Tensor, "batch masked dim"], prompts: Float[Tensor, "batch visible dim"]
    ) -> Float[Tensor, "batch masked dim"]:
        queries = self.norm1(x)
        context = torch.cat([prompts, queries], dim=1)  # prompts are not normalized, as in the authors' code
        q = rearrange(self.q(queries), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.kv(context), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = x + self.proj(attended)
        return x + self.mlp(self.norm2(x))


class PromptingDecoder(nn.Module):
    """Predicts the teacher's features of all patches (section 3.3): of masked ones from mask tokens and the prompts."""

    positions: Tensor

    def __init__(
        self, encoder_dim: int, dim: int, depth: int, num_heads: int, out_dim: int, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.register_buffer("positions", sincos_positions(dim, *grid))
        self.blocks = nn.ModuleList([PromptBlock(dim, num_heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, out_dim)
        init_transformer(self)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens dim"],
        visible: Int[Tensor, "batch visible"],
        masked: Int[Tensor, "batch masked"],
    ) -> Float[Tensor, "batch tokens+masked out_dim"]:
        """Predictions for the class token, the visible patches and the masked ones, in this order."""
        tokens = self.embed(tokens)
        prompts = torch.cat([tokens[:, :1], tokens[:, 1:] + self.positions[visible]], dim=1)  # (n, 1 + visible, dim)
        x = self.mask_token.to(tokens.dtype) + self.positions[masked]
        for block in self.blocks:
            x = block(x, prompts)  # the prompts stay as the encoder made them
        return self.predict(self.norm(torch.cat([prompts, x], dim=1)))


class MILAN(Method):
    """Masked image pretraining on language assisted representation (arXiv:2208.06049).

    Args:
        backbone: the vision transformer to train, with positions `sincos` or `learned`.
        teacher: the frozen network whose features are predicted: a run folder or exported backbone, timm/NAME, or a
            module. The paper's is timm/vit_base_patch16_clip_quickgelu_224.openai.
        view: augmentation of an image.
        mask_ratio: fraction of the patches that is masked.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
        teacher_size: side in pixels of the teacher's images, so that its grid of patches is the student's; null leaves
            them as they are.

    Raises:
        UserError: the backbone is no vision transformer or has relative positions, no patch or all would be masked,
            there is no teacher, or its grid is another.
    """

    rgb_only = True

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        teacher: nn.Module | str | None = None,
        view: View = MAE_CROP,
        mask_ratio: float = 0.75,
        decoder_dim: PositiveInt = 512,
        decoder_depth: int = 8,
        decoder_num_heads: PositiveInt = 16,
        teacher_size: PositiveInt | None = None,
    ) -> None:
        super().__init__()
        self.backbone = require_transformer(backbone, "MILAN", drops_patches=True)
        self.view = view
        grid = patch_grid(view.size, view.size, self.backbone.patch_size)
        num_patches = grid[0] * grid[1]
        self.num_visible = int(num_patches * (1 - mask_ratio) + 1e-6)
        require_mask(num_patches - self.num_visible, num_patches)
        self.teacher = open_teacher(teacher, view, teacher_size)
        self.teacher.require_grid(grid)
        dim, out_dim = self.backbone.dim, self.teacher.dim
        self.decoder = PromptingDecoder(dim, decoder_dim, decoder_depth, decoder_num_heads, out_dim, grid)

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def predict(
        self,
        images: Float[Tensor, "batch 3 height width"],
        features: TeacherFeatures,
        index: Int[Tensor, "batch"],
        clock: Clock,
    ) -> tuple[Float[Tensor, "batch tokens dim"], Int[Tensor, "batch visible"], Int[Tensor, "batch masked"]]:
        """Predictions for the class token, the visible and the masked patches; and which patches these are."""
        tokens = self.backbone.embed(images)
        # Semantic aware masking (section 3.4): patches in an order sampled by attention; the first are visible.
        order = semantic_order(features.attention, index, clock)
        visible, masked = order[:, : self.num_visible], order[:, self.num_visible :]
        encoded = self.backbone.encode(gather_tokens(tokens, visible))  # (n, 1 + visible, dim)
        return self.decoder(encoded, visible, masked), visible, masked

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        features = self.teacher(images)  # without gradient
        prediction, visible, masked = self.predict(images, features, batch.index, clock)
        target = gather_tokens(features.patches, torch.cat([visible, masked], dim=1))  # in the prediction's order
        if features.cls is not None:
            target = torch.cat([features.cls[:, None], target], dim=1)
        loss = cosine_loss(prediction[:, -target.shape[1] :], target)  # without a target for the cls token, not for it
        visible_attention = features.attention.gather(1, visible).sum(dim=1).mean()
        return {"loss": loss, "visible_attention": visible_attention}
