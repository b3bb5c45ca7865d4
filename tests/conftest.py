"""The backends that every test runs on."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import packaging_tools
import pytest
from hypothesis import settings

from mlx_adadelta.backend import backends, extension

# CI tries the same examples every time, `scripts/test --long` new and more ones.
settings.register_profile(
    "ci", max_examples=200, derandomize=True, deadline=None, database=None
)
settings.register_profile(
    "long", max_examples=5000, deadline=None, database=None, print_blob=True
)

# csrc/eval_metal.cpp and the Metal kernels, run on the host in place of the CPU
# kernel; a Mac has the real ones.
HOST_METAL = "host-metal"
KERNELS = [name for name in backends() if extension is not None and name != "mlx"]
# The same kernels through mx.fast.metal_kernel, for which the host has a stand-in.
ROAD, HOST_ROAD = "metal-road", "host-metal-road"
ROADS = [ROAD] if "metal" in backends() else []
if sys.platform == "linux":
    from host_metal import backend as host_metal
    from host_metal import custom_kernel

    KERNELS.append(HOST_METAL)
    ROADS.append(HOST_ROAD)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long",
        action="store_true",
        help="also run the tests marked long, and 5,000 examples of each property",
    )


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("long" if config.getoption("--long") else "ci")


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    if not config.getoption("--long"):
        left_out = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _use(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if name == HOST_METAL:
        monkeypatch.setattr("mlx_adadelta.backend.extension", host_metal.load())
        name = "cpu"
    if name == HOST_ROAD:
        monkeypatch.setattr("mlx.core.fast.metal_kernel", custom_kernel.metal_kernel)
        monkeypatch.setattr("mlx_adadelta.backend.extension", custom_kernel.EXTENSION)
        name = "cpu"
    if name == ROAD:
        monkeypatch.setattr("mlx_adadelta.backend.extension", None)
        name = "metal"
    if name == "mlx":
        # g++ takes a second for each set of types and options. test_compiled.py
        # shows that compiled operations give the bits of these.
        monkeypatch.setattr("mlx_adadelta.reference.compiles_exactly", lambda _: False)
    device = mx.default_device()
    mx.set_default_device(mx.gpu if name == "metal" else mx.cpu)
    yield name
    mx.set_default_device(device)


def each(names: list[str]) -> Any:
    """A fixture: the name to pass as `backend`; its device is the default meanwhile."""

    @pytest.fixture(params=names)
    def fixture(
        request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
    ) -> Iterator[str]:
        yield from _use(request.param, monkeypatch)

    return fixture


backend = each([*KERNELS, *ROADS, "mlx"])
kernel = each([*KERNELS, *ROADS])
native = each(KERNELS)  # the extension alone, for what the others do not promise


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU is the default device meanwhile."""
    for _ in _use("cpu", monkeypatch):
        yield


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist alone, native and unoptimised."""
    return packaging_tools.build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with that wheel and MLX."""
    return packaging_tools.install(wheel, tmp_path_factory.mktemp("installation"))
