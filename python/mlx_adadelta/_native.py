"""Loads the native extension, or knows why it cannot be used."""

from __future__ import annotations

import importlib
from types import ModuleType

import mlx.core as mx

# mlx's stubs leave it out.
MLX_VERSION: str = mx.__version__  # type: ignore[attr-defined]

REMEDY = (
    "Install the version of mlx that mlx-adadelta was built for; where it was not "
    "built, MLX_ADADELTA_REQUIRE_NATIVE=1 pip install --no-deps --force-reinstall . "
    "in a checkout shows why."
)


def _probe(module: ModuleType) -> None:
    """Makes one real call; builds a graph, evaluates nothing."""
    x = [mx.zeros((1,), stream=mx.cpu)]
    module.adadelta_update(
        x,
        x,
        x,
        x,
        mx.array(1.0),
        rho=0.9,
        eps=1e-6,
        weight_decay=0.0,
        decoupled_weight_decay=False,
        decays=[],
        maximize=False,
        stochastic_rounding=False,
        seed=0,
        step=None,
        gradient_scale=None,
        skip=None,
        stream=mx.cpu,
    )


def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("._ext", __package__)
    except ImportError as error:
        return None, f"the native extension cannot be loaded: {error}"
    if module.mlx_version != MLX_VERSION:
        return None, (
            f"the native extension was built for mlx {module.mlx_version}, "
            f"but this is mlx {MLX_VERSION}"
        )
    try:
        _probe(module)
    except TypeError as error:
        return None, (
            "the native extension does not share types with mlx (built with "
            f"another version of nanobind?): {str(error).splitlines()[0]}"
        )
    return module, ""


extension, why_not = _load()
