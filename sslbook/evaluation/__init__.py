"""How good features are: one protocol, one file.

`features` extracts them; `knn`, `linear` and `factors` measure them; `controls` are what to compare with; `table` puts
the figures side by side.
"""

from sslbook.evaluation import controls, factors, features, knn, linear, table
from sslbook.evaluation.features import extract_features
from sslbook.evaluation.linear import LinearResult
from sslbook.evaluation.table import Row, format_table, measure, score

__all__ = [
    "LinearResult",
    "Row",
    "controls",
    "extract_features",
    "factors",
    "features",
    "format_table",
    "knn",
    "linear",
    "measure",
    "score",
    "table",
]
