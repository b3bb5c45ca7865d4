"""The package's extension with its Metal path on Linux: "host-metal"."""

import ctypes
import functools
import importlib.util
from pathlib import Path
from types import ModuleType

from . import build


@functools.cache
def load() -> ModuleType:
    """An `_ext` whose CPU streams run csrc/eval_metal.cpp; built if need be."""
    build.build(build.EXTENSION)
    return load_from(build.ROOT / build.BUILD / build.EXTENSION)


def load_from(path: Path) -> ModuleType:
    name = f"host_metal.{path.name.split('.')[0]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Mock:
    """The mocked Metal below a loaded extension (mock_metal.cpp)."""

    def __init__(self, module: ModuleType) -> None:
        assert module.__file__ is not None
        self._library = ctypes.CDLL(module.__file__)
        self._library.host_metal_end_record.restype = ctypes.c_char_p
        self._library.host_metal_source.restype = ctypes.c_char_p
        self.max_threads = ctypes.c_size_t.in_dll(
            self._library, "host_metal_max_threads"
        )

    def start_record(self) -> None:
        self._library.host_metal_start_record()

    def end_record(self) -> list[list[str]]:
        """What happened since: ["dispatch", kernel, bytes], ["barrier"], and
        ["library", name, path or "compiled"]."""
        lines = self._library.host_metal_end_record().decode().splitlines()
        return [line.split(" ", 2) for line in lines]  # a path may hold spaces

    def source(self) -> str:
        """The source of the library that was compiled last."""
        return str(self._library.host_metal_source().decode())
