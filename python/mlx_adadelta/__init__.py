"""AdaDelta for MLX as one fused kernel."""

import warnings

from .backend import REMEDY, backends, why_not
from .gradients import clip_scale, nonfinite
from .match_layout import match_layout
from .optimizer import AdaDelta
from .update import adadelta_update

__version__ = "0.2.0"

__all__ = [
    "AdaDelta",
    "__version__",
    "adadelta_update",
    "backends",
    "clip_scale",
    "match_layout",
    "nonfinite",
]

if backends() == ("mlx",):
    warnings.warn(
        f"mlx_adadelta runs on plain MLX operations: {why_not}. {REMEDY}",
        RuntimeWarning,
        stacklevel=2,
    )
