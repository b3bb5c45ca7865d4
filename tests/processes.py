"""Other processes, with this package or a copy of it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx_adadelta


def copy_package(folder: Path) -> Path:
    """A copy of the Python files alone, which `run_python` can take from the folder."""
    package = folder / "mlx_adadelta"
    package.mkdir()
    for file in Path(mlx_adadelta.__file__).parent.glob("*.py"):
        shutil.copy(file, package)
    return package


def run_python(
    *arguments: str,
    path: Path | None = None,
    cwd: Path | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Runs Python with packages from the folder `path` before all others."""
    # An editable installation comes first, unless .pth files are not read (-S).
    no_site = [] if path is None else ["-S"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MLX_ADADELTA_")}
    if path is not None:
        clean["PYTHONPATH"] = os.pathsep.join((str(path), *sys.path))
    return subprocess.run(
        [sys.executable, *no_site, *arguments],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=600,  # long enough where everything is slow
        check=False,
    )
