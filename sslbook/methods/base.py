"""The contract of a method: a module whose forward is the loss."""

from jaxtyping import Int
from torch import Tensor, nn

from sslbook.data.loader import Batch, Data
from sslbook.data.views import View
from sslbook.schedules import Clock


class Method(nn.Module):
    """Base of every self-supervised method.

    A method owns everything that changes while it learns as a parameter or a buffer: teacher, queue, memory, center.
    Saving, moving to a device and spreading over processes then need no further code.
    """

    backbone: nn.Module
    """What is kept when training ends: maps images `(n, 3, h, w)` to features `(n, backbone.dim)`."""

    def views(self) -> tuple[View, ...]:
        """What one image becomes; `batch.views` holds one tensor for each entry."""
        raise NotImplementedError

    def forward(self, batch: Batch, clock: Clock) -> dict[str, Tensor]:
        """The loss under the key `loss`; every other entry is a detached scalar to be logged."""
        raise NotImplementedError

    def setup(self, data: Data) -> None:
        """Called once before training, and before any state is loaded: memories with a row per image are sized here.

        Raises a `UserError` if the data do not suit the method.
        """

    def on_weights_loaded(self, taken: list[str]) -> None:
        """Called when a new run has begun from weights, with the names of the state's tensors that were taken.

        Teachers need nothing: where the weights know none, they became copies of their students.
        """

    def before_epoch(self, data: Data, clock: Clock) -> None:
        """Called before every epoch, in every process: clusterings are made here."""

    def sample_order(self, data: Data, clock: Clock) -> Int[Tensor, "images"] | None:
        """Which images the epoch shows, in order, where a plain permutation will not do; the same in every process.

        A pure function of the method's state and the clock's epoch, since a resumed run asks again.
        """
        return None

    def after_step(self, clock: Clock) -> None:
        """Called once after every optimizer step: teachers and centers move here."""
