"""Loads the native extension, or knows why not, and chooses the backend."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Literal, TypeAlias, get_args

import mlx.core as mx

from . import reference
from .options import Options, shown

Backend = Literal["auto", "metal", "cpu", "mlx"]
StreamOrDevice: TypeAlias = (
    "mx.Stream | mx.ThreadLocalStream | mx.Device | mx.DeviceType | None"
)

# reference.adadelta_update, or the extension's, of the same signature.
Update: TypeAlias = Callable[..., tuple[list[mx.array], list[mx.array], list[mx.array]]]

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
        *(x, x, x, x, mx.array(1.0), Options()),
        path=str,
        decays=[],
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


def backends() -> tuple[str, ...]:
    """The backends that can run here, best first; always ends with ``"mlx"``."""
    if extension is None:
        return ("mlx",)
    return ("metal", "cpu", "mlx") if extension.has_metal else ("cpu", "mlx")


def _device_type(stream: StreamOrDevice) -> mx.DeviceType:
    if isinstance(stream, mx.DeviceType):
        return stream
    device = mx.default_device() if stream is None else stream
    return device.type if isinstance(device, mx.Device) else device.device.type


def resolve_backend(
    backend: str, stream: StreamOrDevice = None
) -> Literal["metal", "cpu", "mlx"]:
    """Chooses the backend for work on a stream.

    Args:
        backend (str): ``"metal"``, ``"cpu"``, ``"mlx"``, or ``"auto"``: the
            environment variable ``MLX_ADADELTA_BACKEND`` where it is set,
            otherwise the native kernel of the stream's device, otherwise
            ``"mlx"``.
        stream (Stream or Device, optional): Default: the default device.

    Raises:
        ValueError: No backend has that name, or it cannot run on that stream.
        RuntimeError: The backend was asked for by name and cannot run here.
    """
    asked = backend
    if backend == "auto":
        backend = os.environ.get("MLX_ADADELTA_BACKEND") or "auto"
    if backend not in get_args(Backend):
        names = ", ".join(get_args(Backend))
        raise ValueError(f"backend must be one of {names} but is {shown(backend)}")
    here = backends()
    device = _device_type(stream)
    if backend == "auto":
        backend = "metal" if device == mx.gpu else "cpu"
        return backend if backend in here else "mlx"  # type: ignore[return-value]
    if backend not in here:
        reason = why_not or "MLX has no Metal device"
        raise RuntimeError(f"backend {backend!r} cannot run here: {reason}")
    wanted = {"metal": mx.gpu, "cpu": mx.cpu}.get(backend, device)
    if stream is not None and asked != "auto" and device != wanted:
        raise ValueError(f"backend {backend!r} cannot run on {stream}")
    return backend  # type: ignore[return-value]


def choose(
    backend: str, stream: StreamOrDevice, parameters: list[mx.array]
) -> tuple[Update, StreamOrDevice]:
    """The function that updates these parameters, and the stream to give it."""
    name = resolve_backend(backend, stream)
    if name == "mlx" or extension is None:
        return reference.adadelta_update, stream
    if extension.has_float64(parameters):
        if backend != "auto":
            raise TypeError(f"backend {name!r} has no float64; use backend 'mlx'")
        return reference.adadelta_update, stream
    device = {"metal": mx.gpu, "cpu": mx.cpu}[name]
    return extension.adadelta_update, stream or device
