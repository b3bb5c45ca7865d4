"""scripts/tune, with a bench that reports what the copy's header says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

# Stands for scripts/bench: its figure is made from the constants.
BENCH = r"""
root=$(dirname -- "$0")/..
mkdir -p "$root/out"
value() { sed -n "s/.*$1 = \([0-9]*\).*/\1/p" "$root/metal/adadelta_step.h"; }
x=$(value kThreads)$(value kTileBytes | head -1).$(value kElementsPerThread)
results="{\"ours\": {\"of_limit\": {\"median\": $x, \"q1\": $x, \"q3\": $x}}}"
for name in large transformer; do
  echo "{\"name\": \"$name\", \"results\": $results}"
done | paste -sd , | sed 's/.*/{"cases": [&]}/' >"$root/out/bench.json"
"""


@pytest.fixture
def tune() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tune", SCRIPTS / "tune.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_value_is_built_and_measured(
    tune: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder in ("scripts", "metal"):
        (tmp_path / folder).mkdir()
    (tmp_path / "scripts/bench").write_text(BENCH)
    header = (SCRIPTS.parent / tune.HEADER).read_text()
    (tmp_path / tune.HEADER).write_text(header)
    monkeypatch.setattr(tune, "ROOT", tmp_path)
    monkeypatch.setenv("COLUMNS", "140")
    assert tune.main(["--device", "cpu"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    large = [row.split("│")[2].split()[0] for row in rows]
    # threads, tile, elements: the shipped ones, then one at a time
    assert large == [
        *("256128.400", "256128.800", "256128.160"),
        *("128128.400", "512128.400", "1024128.400", "256256.400"),
    ]
    assert (tmp_path / tune.HEADER).read_text() == header


def test_a_constant_that_is_not_there(tune: ModuleType) -> None:
    with pytest.raises(ValueError, match="must set kThreads once but does 0 times"):
        tune.set_constant("kTileBytes = 128", "kThreads", 1)


@pytest.mark.skipif(mx.metal.is_available(), reason="there is a Metal device")
def test_without_metal_it_says_so(
    tune: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tune.main([])
    assert "no Metal device here" in capsys.readouterr().err
