"""experiments/paper_mnist.py and experiments/choosing.py on little data."""

import re
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

from experiments import choosing, paper_mnist

PNG = b"\x89PNG\r\n\x1a\n"
pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ten bright pixels stand for ten classes."""
    monkeypatch.setattr(paper_mnist, "HIDDEN", (12, 8))
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 120), ("test", 50)):
        y = np.arange(count, dtype=np.uint8) % 10
        x = rng.integers(0, 100, (count, 4, 4), dtype=np.uint8)
        x.reshape(count, 16)[np.arange(count), y] += 150
        arrays |= {f"x_{split}": x, f"y_{split}": y}
    np.savez(tmp_path / "data.npz", **arrays)
    options = {"--epochs": "2", "--batch-size": "20"}
    options |= {"--data": str(tmp_path / "data.npz"), "--out": str(tmp_path / "out")}
    return [word for pair in options.items() for word in pair]


def test_every_cell_equals_stock(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper_mnist.main(arguments) == 0
    assert "equal stock's to the bit in 12 cells" in capsys.readouterr().out

    rows = (tmp_path / "out" / "paper.md").read_text().splitlines()
    assert rows[2].startswith("| 1e-02 | 0.9 | 2.59 |")
    cells = [row.strip("| ").split(" | ") for row in rows[2:]]
    assert len({(eps, rho) for eps, rho, *_ in cells}) == len(cells) == 12
    assert all(x[3] == x[4] and x[5] == "equal" for x in cells)
    assert min(float(x[4]) for x in cells) < 80  # by chance: 90
    assert len({x[4] for x in cells}) > 1
    assert (tmp_path / "out" / "paper.png").read_bytes().startswith(PNG)


def test_one_ulp_is_told_and_fails(
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Off(optim.AdaDelta):
        def apply_single(
            self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
        ) -> mx.array:
            moved = super().apply_single(gradient, parameter, state)
            if self.rho == 0.95:
                state["u"] = state["u"] * (1 + 2**-23)
            return moved

    monkeypatch.setitem(paper_mnist.OPTIMIZERS, "ours", Off)
    assert paper_mnist.main(arguments) == 1
    printed = capsys.readouterr().out
    listed = "; ".join(f"rho 0.95, eps 1e-0{i}" for i in (2, 4, 6, 8))
    assert f"differ from stock's for {listed}\n" in printed
    assert "equal stock's" not in printed


def test_an_out_that_is_a_file(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        paper_mnist.main([*arguments, "--out", __file__])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "File exists" in error and error.count("\n") == 1


def test_choosing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choosing, "RHOS", (0.9,))
    monkeypatch.setattr(choosing, "EPSILONS", (1e-6, 1e-2))
    monkeypatch.setattr(choosing, "RATES", (1.0, 3.0))
    out = tmp_path / "choosing.png"
    assert choosing.main(["--epochs", "1", "--seeds", "1", "--out", str(out)]) == 0
    assert out.read_bytes().startswith(PNG)
    rows = re.findall(r"\| (1e-0\d) \| (\d+\.\d) \|", capsys.readouterr().out)
    assert [eps for eps, _ in rows] == ["1e-06", "1e-02"]


def test_first_steps_are_as_choosing_says() -> None:
    """At most sqrt(eps / (1 - rho)), less where gradients are zero."""
    _, _, sizes = choosing.train((0.9, 1e-8, 1.0), seed=0, epochs=1)
    most = (1e-8 / (1 - 0.9)) ** 0.5
    assert most / 2 < sizes[0] < most
    assert sizes[-1] > sizes[0]
