"""experiments/precision.py: it runs, records its runs and refuses bad input."""

import json
from pathlib import Path

import numpy as np
import pytest

from experiments import precision
from experiments.precision import BFLOAT16, FLOAT32, GIVEN, NARROW

ROUNDINGS = ("", ", stochastic rounding")


def test_a_quick_run(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(precision, "SEEN", 256)
    images = np.random.default_rng(0).integers(0, 255, (300, 28, 28), np.uint8)
    labels = np.arange(300) % 10
    file = tmp_path / "mnist.npz"
    np.savez(file, x_train=images, y_train=labels, x_test=images, y_test=labels)
    out = tmp_path / "out"
    arguments = ["--quick", "--mnist", str(file), "--out", str(out)]
    assert precision.main(arguments) == 0
    assert (out / "precision.png").stat().st_size > 0

    record = json.loads((out / "precision.json").read_text())
    assert record["given"].keys() == GIVEN.keys()
    for title, (given, modes, _) in GIVEN.items():
        cases = record["given"][title]
        assert len(cases) == len(given) == 4
        for case in cases:
            ends = case["ends"]
            assert list(ends) == [mode.name for mode in modes]
            for name in "wvu":
                exact = ends["float64"][name]
                # Three roundings of a weight of 100.
                slack = 3 * 2**-18 if "from 100" in case["case"] and name == "w" else 0
                near = pytest.approx(exact["mean"], rel=1e-4, abs=slack or 1e-7)
                assert ends["float32"][name]["mean"] == near
                assert (exact["sd"] > 1e-12) == ("Gaussian" in title)
    for name in "wvu":
        first = record["given"]["A constant gradient"][0]["ends"]
        assert first["bfloat16"][name]["sd"] == 0
    assert first["bfloat16, stochastic rounding"]["v"]["sd"] > 0
    first = record["given"]["A constant gradient, float32 weights"][0]["ends"]
    nearest, stochastic = (
        first[f"float32, bfloat16 state{how}"]["v"] for how in ROUNDINGS
    )
    assert nearest["sd"] == 0 < stochastic["sd"]
    assert nearest["mean"] != first["float32"]["v"]["mean"]
    cases = record["given"]["Gaussian gradients, float32 weights"]
    assert len({case["ends"]["float64"]["u"]["mean"] for case in cases}) == 4
    names = ["digits, lr 1, rho 0.9", "digits, lr 0.1, rho 0.999", "text", "MNIST"]
    assert [task["name"] for task in record["tasks"]] == names
    for task in record["tasks"]:
        results = task["results"]
        for mode in (FLOAT32, *BFLOAT16):
            wide = mode is FLOAT32 or "float32 state" in mode.name
            assert results[mode.name]["state_bytes"] == (8 if wide else 4)
        if task["name"].startswith("digits"):
            for mode in NARROW:
                assert results[mode.name]["state_bytes"] == 4
        # The same start and batches, but not the same numbers.
        losses = np.array([result["losses"] for result in results.values()])
        assert losses.shape[1] == 2
        assert 0 < np.ptp(losses, axis=0).max() < 0.1
        assert results[FLOAT32.name]["above"] == {"mean": 0, "sd": 0}
    tables = (out / "precision.md").read_text()
    printed = capsys.readouterr().out
    for mode in (FLOAT32, *BFLOAT16, *NARROW):
        assert f"| {mode.name} |" in tables
        assert mode.name in printed
