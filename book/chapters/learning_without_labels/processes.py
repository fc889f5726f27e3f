"""What the chapter *Learning without labels* runs in two processes."""

from torch import Tensor

from sslbook import distributed
from sslbook.data.datasets.shapes import Shapes
from sslbook.data.loader import Data
from sslbook.data.views import View


def views_of_process(shapes: Shapes, view: View, batch_size: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Indices and views of this process's part of the epoch's first batch; for `sslbook.distributed.launch`."""
    part = {"rank": distributed.rank(), "world_size": distributed.world_size()}
    batch = next(iter(Data(shapes=shapes).batches((view,), batch_size, seed=seed, epoch=epoch, **part)))
    return batch.index, batch.views[0]
