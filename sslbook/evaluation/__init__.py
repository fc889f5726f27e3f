"""How good features are: `protocols` measure them, one in one file, and `controls` are what to compare with.

`features` extracts them, `base` applies any protocols to any networks and knows none by name.
"""

from sslbook.evaluation import base, controls, features
from sslbook.evaluation.features import extract_features
from sslbook.evaluation.protocols import factors, knn, linear

__all__ = ["base", "controls", "extract_features", "factors", "features", "knn", "linear"]
