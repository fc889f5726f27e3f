"""The interface of a method: a module whose forward pass returns the loss."""

from jaxtyping import Int
from torch import Tensor, nn

from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.schedules import Clock


class Method(nn.Module):
    """Base class of every self-supervised method.

    Everything that changes during training is a parameter or a buffer: teacher, queue, memory bank, center. Saving,
    moving to a device and broadcasting to other processes then need no further code.

    The events of a training step, in order: `forward` and backward (once, or for each part of an accumulated batch),
    `before_optimizer_step`, the optimizer, `after_step`.
    """

    backbone: nn.Module
    """The network that training is for: images `(n, 3, height, width)` to features `(n, backbone.dim)`."""

    min_images = 1
    """How many images a loss is for at least: 2 where other images are negatives, or where a batch has a variance."""

    can_shard = True
    """Whether the method trains in shards, which needs that its networks' blocks are called as they are."""

    rgb_only = False
    """Whether the method is about red, green and blue, and cannot learn from other channels."""

    def views(self) -> tuple[View, ...]:
        """The views made of each image; `batch.views` holds one tensor for each of them."""
        raise NotImplementedError

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """The loss under the key `loss`; every other entry is a detached scalar to be logged."""
        raise NotImplementedError

    def setup(self, data: Data) -> None:
        """Called once before training, and before any state is loaded: memory banks are sized here.

        Raises:
            UserError: the data do not suit the method.
        """

    def on_weights_loaded(self, taken: list[str]) -> None:
        """Called when a new run starts from given weights; `taken` names the tensors of the state that they set.

        EMA teachers need nothing here: those that the weights do not contain have become copies of their students.
        """

    def before_epoch(self, data: Data, clock: Clock) -> None:
        """Called before every epoch, in every process; clustering methods cluster here."""

    def sample_order(self, data: Data, clock: Clock) -> Int[Tensor, "images"] | None:
        """The images of an epoch in order, the same in every process; None for a random permutation of all.

        A pure function of the method's state and the clock's epoch, since a resumed run computes it again.
        """
        return None

    def before_optimizer_step(self, clock: Clock) -> None:
        """Called once per step when all gradients are complete, before they are clipped and the optimizer uses them.

        They are averaged over processes and free of mixed precision's scale. A gradient that is removed here
        (`parameter.grad = None`) does not count in the norm that is clipped, and the optimizer neither moves nor decays
        its parameter, nor starts a state for it.
        """

    def after_step(self, clock: Clock) -> None:
        """Called once after every optimizer step, with the clock already advanced; EMA teachers are updated here."""
