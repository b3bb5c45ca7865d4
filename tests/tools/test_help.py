"""Every script answers --help where nothing is installed, and builds nothing for it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(x.name for x in (ROOT / "scripts").iterdir() if x.is_file())
SCRIPTS = [name for name in SCRIPTS if "." not in name]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts without a .venv."""
    folder = tmp_path_factory.mktemp("a tree")
    for name in ("scripts", "bench", "experiments"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(tree: Path, name: str) -> None:
    before = set(tree.iterdir())
    done = subprocess.run(
        [tree / "scripts" / name, "--help"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) > 40
    assert set(tree.iterdir()) == before
