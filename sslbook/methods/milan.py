"""MILAN: see a quarter of an image's patches and say what a network that knows the world says of all of them.

The targets are not pixels but the features of a frozen teacher, in the paper CLIP's, which are full of what captions
talk about. The teacher also chooses what is seen: patches it attends to are more likely to stay visible. The decoder
fills in the hidden patches and leaves the encoded visible ones as they are, so that these must be good by themselves.

Hou, Sun, Chen, Xie and Kung, 2022, "MILAN: Masked image pretraining on language assisted representation"
(arXiv:2208.06049): section 3.2 the targets and the loss, 3.3 the prompting decoder, 3.4 semantic aware masking. As in
the authors' code the loss is over visible and hidden patches, and the class token too where the teacher has one. What
differs: any frozen network can teach (`sslbook.nn.teachers`), one without class token by what each place contributes to
its mean; and the draw of the visible patches is keyed. The targets are features after the last norm, without CLIP's
projection: 768 values for ViT-B/16, as many as the authors' decoder predicts.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from sslbook import rng
from sslbook.data.loader import Batch
from sslbook.data.views import MAE_CROP, View
from sslbook.errors import UserError
from sslbook.methods.base import Method
from sslbook.nn.teachers import Seen, Teacher
from sslbook.nn.vit import (
    FeedForward,
    VisionTransformer,
    init_transformer,
    patch_grid,
    require_heads,
    resample_positions,
    sincos_positions,
)
from sslbook.schedules import Clock


def cosine_loss(prediction: Float[Tensor, "*rows dim"], target: Float[Tensor, "*rows dim"]) -> Float[Tensor, ""]:
    """Squared distance of the normalized features, 2 - 2 cos, averaged over rows (section 3.2)."""
    return (2 - 2 * F.cosine_similarity(prediction.float(), target.float(), dim=-1)).mean()


def semantic_order(
    attention: Float[Tensor, "batch patches"], index: Int[Tensor, "batch"], clock: Clock
) -> Int[Tensor, "batch patches"]:
    """All patches in a random order: one after the other is drawn with probability in proportion to its attention.

    The logarithms of uniform numbers, divided by the weights and sorted, have this law (Efraimidis and Spirakis, 2006).
    """
    u = rng.uniform(clock.seed, clock.epoch, index, rng.METHOD, attention.shape[1]).double()
    key = u.clamp_min(2.0**-26).log() / attention.double()  # minus infinity without attention: seen last of all
    return key.argsort(dim=1, descending=True, stable=True)


def take(x: Float[Tensor, "batch patches dim"], index: Int[Tensor, "batch some"]) -> Float[Tensor, "batch some dim"]:
    """The patches at the given places, image by image."""
    return x.gather(1, index[:, :, None].expand(-1, -1, x.shape[2]))


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
        self, x: Float[Tensor, "batch hidden dim"], prompts: Float[Tensor, "batch visible dim"]
    ) -> Float[Tensor, "batch hidden dim"]:
        own = self.norm1(x)
        both = torch.cat([prompts, own], dim=1)  # prompts are not normalized, as in the authors' code
        q = rearrange(self.q(own), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.kv(both), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)")
        x = x + self.proj(attended)
        return x + self.mlp(self.norm2(x))


class PromptingDecoder(nn.Module):
    """Says the teacher's features of all patches: those of hidden ones from mask tokens, prompted by the visible."""

    def __init__(
        self, encoder_dim: int, dim: int, depth: int, num_heads: int, out_dim: int, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.grid = grid
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
        hidden: Int[Tensor, "batch hidden"],
        grid: tuple[int, int],
    ) -> Float[Tensor, "batch tokens+hidden out_dim"]:
        """The class token, the visible patches and the hidden ones, in this order."""
        positions = resample_positions(self.positions, self.grid, grid)
        tokens = self.embed(tokens)
        prompts = torch.cat([tokens[:, :1], tokens[:, 1:] + positions[visible]], dim=1)
        x = self.mask_token.to(tokens.dtype) + positions[hidden]
        for block in self.blocks:
            x = block(x, prompts)
        return self.predict(self.norm(torch.cat([prompts, x], dim=1)))


class MILAN(Method):
    """Masked image pretraining on language assisted representation (arXiv:2208.06049).

    Args:
        backbone: the vision transformer to train.
        teacher: the frozen network whose features are predicted: a run folder or exported backbone, timm/NAME,
            open_clip/NAME:WEIGHTS, transformers/NAME, or a module. The paper's is open_clip/ViT-B-16:openai.
        view: what an image becomes.
        mask_ratio: part of the patches that is hidden.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder.
        decoder_num_heads: attention heads of the decoder.
        teacher_size: side of the images that the teacher gets, where its patches must be brought to the student's
            grid; null leaves them as they are.
    """

    backbone: VisionTransformer  # pyrefly: ignore[bad-override-mutable-attribute]

    def __init__(
        self,
        backbone: nn.Module,
        teacher: nn.Module | str | None = None,
        view: View = MAE_CROP,
        mask_ratio: float = 0.75,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        teacher_size: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, VisionTransformer) or backbone.rel_pos_bias is not None:
            raise UserError(
                f"MILAN hides patches from a vision transformer and cannot use this {type(backbone).__name__}: choose "
                "sslbook.nn.VisionTransformer with positions sincos or learned, or vit_tiny, vit_small, vit_base, ..."
            )
        self.view, self.mask_ratio = view, mask_ratio
        grid = patch_grid(view.size, view.size, backbone.patch_size)
        self.num_visible(grid[0] * grid[1])  # refuses a ratio that leaves nothing to do
        self.backbone = backbone
        self.teacher = Teacher(teacher, view, teacher_size)
        self.teacher.require_grid(grid)
        self.decoder = PromptingDecoder(
            backbone.dim, decoder_dim, decoder_depth, decoder_num_heads, self.teacher.dim, grid
        )

    def views(self) -> tuple[View, ...]:
        return (self.view,)

    def num_visible(self, num_patches: int) -> int:
        """How many patches the encoder sees; a `UserError` if that is none or all."""
        visible = int(num_patches * (1 - self.mask_ratio) + 1e-6)
        if not 0 < visible < num_patches:
            raise UserError(
                f"mask ratio {self.mask_ratio} of {num_patches} patches leaves nothing to "
                f"{'predict' if visible else 'see'}: "
                f"use a ratio of at least {1 / num_patches:.3g} and at most {1 - 1 / num_patches:.3g}"
            )
        return visible

    def predict(
        self, images: Float[Tensor, "batch 3 height width"], seen: Seen, index: Int[Tensor, "batch"], clock: Clock
    ) -> tuple[Float[Tensor, "batch tokens dim"], Int[Tensor, "batch visible"], Int[Tensor, "batch hidden"]]:
        """What is said of the class token, the visible and the hidden patches, and which these are."""
        tokens = self.backbone.embed(images)
        order, visible = semantic_order(seen.attention, index, clock), self.num_visible(tokens.shape[1])
        visible, hidden = order[:, :visible], order[:, visible:]
        return self.decoder(self.backbone.encode(take(tokens, visible)), visible, hidden, seen.grid), visible, hidden

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        (images,) = batch.views
        seen = self.teacher(images)
        prediction, visible, hidden = self.predict(images, seen, batch.index, clock)
        target = take(seen.patches, torch.cat([visible, hidden], dim=1))
        if seen.cls is not None:
            target = torch.cat([seen.cls[:, None], target], dim=1)
        loss = cosine_loss(prediction[:, -target.shape[1] :], target)
        attended = seen.attention.gather(1, visible).sum(dim=1).mean()
        return {"loss": loss, "visible_attention": attended}
