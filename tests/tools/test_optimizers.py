"""experiments/optimizers.py on a few steps."""

from pathlib import Path

import mlx.optimizers as optim
import pytest

from experiments import optimizers, precision

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def test_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plot.png"
    arguments = ["--steps", "5", "--seeds", "1", "--out", str(path)]
    assert optimizers.main(arguments) == 0
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for line in capsys.readouterr().out.splitlines()
        if len(cells := line.split("|")) > 3
    }
    ours, stock = rows["AdaDelta, this one"], rows["AdaDelta, stock"]
    assert ours[:2] == stock[:2]  # the rate and the loss, as the same bits give
    assert ours[1] != rows["Adam"][1] != rows["SGD, momentum 0.9"][1]
    assert [rows[name][3] for name in optimizers.TRIED] == ["8.0"] * 4 + ["4.0"]
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_the_best_rate_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "TRIED", {"SGD": (optim.SGD, (0.0, 0.1, 0.0))})
    task = precision.text(lr=1.0, rho=0.9, steps=10)
    assert optimizers.best_rates(task) == {"SGD": 0.1}
