"""AdaDelta for MLX as one fused kernel."""

import warnings

from . import _native
from .functional import (
    adadelta_update,
    backends,
    clip_scale,
    match_layout,
    nonfinite,
)
from .optimizer import AdaDelta

__version__ = "0.1.0"

__all__ = [
    "AdaDelta",
    "__version__",
    "adadelta_update",
    "backends",
    "clip_scale",
    "match_layout",
    "nonfinite",
]

if _native.extension is None:
    warnings.warn(
        f"mlx_adadelta runs on plain MLX operations: {_native.why_not}. "
        f"{_native.REMEDY}",
        RuntimeWarning,
        stacklevel=2,
    )
