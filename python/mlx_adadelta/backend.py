"""Loads the native extension, or knows why not, and chooses the backend."""

import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import mlx.core as mx

from . import __path__, metal_road, reference
from .options import MLX_VERSION, StreamOrDevice, shown

Backend = Literal["auto", "metal", "cpu", "mlx"]

REMEDY = (
    "In a checkout, MLX_ADADELTA_REQUIRE_NATIVE=1 pip install --no-build-isolation "
    "--no-deps --force-reinstall . builds the extension for the mlx installed, or says "
    "what it needs."
)


def _load() -> tuple[ModuleType | None, str]:
    # Each extension lies in a folder named by the release of MLX that it is for.
    found = [x for place in __path__ for x in Path(place).glob("mlx-*")]
    releases = sorted(folder.name.removeprefix("mlx-") for folder in found)
    if found and MLX_VERSION not in releases:
        return None, (
            f"the native extension was built for mlx {', '.join(releases)}, "
            f"but this is mlx {MLX_VERSION}"
        )
    __path__.extend([str(x) for x in found if x.name == f"mlx-{MLX_VERSION}"])
    try:
        module = importlib.import_module("._ext", __package__)
    except ImportError as error:
        return None, f"the native extension cannot be loaded: {error}"
    try:  # one real call, which builds a graph and evaluates nothing
        module.norm([mx.zeros((1,), stream=mx.cpu)], stream=mx.cpu)
    except TypeError as error:
        return None, (
            "the native extension does not share types with mlx (built with "
            f"another version of nanobind?): {str(error).splitlines()[0]}"
        )
    return module, ""


extension, why_not = _load()


def has_native(backend: str) -> bool:
    """Whether the extension has this backend."""
    return extension is not None and (backend == "cpu" or bool(extension.has_metal))


def has_road() -> bool:
    """Whether the Metal kernels can run without an extension."""
    return mx.metal.is_available() and metal_road.folder() is not None


def backends() -> tuple[str, ...]:
    """The backends that can run here, best first; always ends with ``"mlx"``."""
    here = {"metal": has_native("metal") or has_road(), "cpu": has_native("cpu")}
    return (*(name for name, can_run in here.items() if can_run), "mlx")


def missing(backend: str) -> str:
    """Why a backend is none of backends()."""
    if backend == "cpu":
        return why_not
    has_device = mx.metal.is_available()
    return "the package lacks metal/" if has_device else "MLX has no Metal device"


def resolve_backend(backend: str, stream: StreamOrDevice = None) -> str:
    """The name of the backend for work on a stream; see :class:`AdaDelta`."""
    asked, here = backend, backends()
    if backend == "auto":
        backend = os.environ.get("MLX_ADADELTA_BACKEND") or "auto"
    if backend not in get_args(Backend):
        names = ", ".join(get_args(Backend))
        raise ValueError(f"backend must be one of {names} but is {shown(backend)}")
    device: Any = stream or mx.default_device()
    device = getattr(device, "device", device)  # of a stream
    kind = getattr(device, "type", device)
    if backend == "auto":
        backend = "metal" if kind == mx.gpu else "cpu"
        return backend if backend in here else "mlx"
    if backend not in here:
        raise RuntimeError(f"backend {backend!r} cannot run here: {missing(backend)}")
    wanted = {"metal": mx.gpu, "cpu": mx.cpu}.get(backend, kind)
    if stream is not None and asked != "auto" and kind != wanted:
        raise ValueError(f"backend {backend!r} cannot run on {stream}")
    return backend


def choose(
    backend: str, stream: StreamOrDevice, arrays: list[mx.array]
) -> tuple[ModuleType, Any]:
    """The module that computes, and its stream.

    The arrays are the parameters, or gradients where there are none.
    """
    name = resolve_backend(backend, stream)
    native: Any = extension if has_native(name) else metal_road
    if name != "mlx" and native.has_float64(arrays):
        if backend != "auto":
            raise TypeError(f"backend {name!r} has no float64; use backend 'mlx'")
        name = "mlx"
    if name == "mlx":
        return reference, stream or mx.default_device()
    return native, stream or (mx.gpu if name == "metal" else mx.cpu)
