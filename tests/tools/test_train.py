"""experiments/digits.py: what it refuses, what it prints and what it compares."""

import io

import mlx.optimizers as optim
import numpy as np
import pytest

from experiments import digits

pytestmark = pytest.mark.usefixtures("on_the_cpu")


def images(**changes: np.ndarray) -> dict[str, np.ndarray]:
    """Three classes of 4x4 uint8 images, one bright row each."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 48), ("test", 12)):
        labels = np.arange(count, dtype=np.uint8) % 3
        x = rng.integers(0, 100, (count, 4, 4), dtype=np.uint8)
        x[np.arange(count), labels] += 100
        arrays |= {f"x_{split}": x, f"y_{split}": labels}
    return arrays | changes


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        digits.main(arguments)
    assert exit_.value.code == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    return error


BAD_VALUES = [
    ("--epochs 0", "--epochs: expected a positive integer, got '0'"),
    ("--epochs 1.5", "--epochs: expected a positive integer"),
    ("--batch-size -1", "--batch-size: expected a positive integer"),
    ("--batch-size 1438", "--batch-size: expected at most 1437"),
    ("--lr nan", "learning_rate must be"),
    ("--lr inf", "learning_rate must be"),
    ("--dtype float64", "--dtype: invalid choice: 'float64'"),
    ("--seed -1", "expected non-negative integer"),
    ("--data missing.npz", "missing.npz: [Errno 2] No such file"),
    ("--out figure.pdf", "--out: expected a .png file, got figure.pdf"),
    ("--epoch 3", "unrecognized arguments: --epoch 3"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_VALUES)
def test_bad_value(capsys, arguments, message):
    assert message in refusal(arguments.split(), capsys)


def test_out_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for out in ("file/figure.png", "folder.png"):
        error = refusal(["--out", str(tmp_path / out)], capsys)
        assert out.partition("/")[0] in error


BAD_ARRAYS = [
    {"x_train": np.zeros((48, 4, 4), complex)},
    {"x_train": np.zeros(48)},
    {"x_test": np.zeros((0, 4, 4))},
    {"x_test": np.full((12, 4, 4), np.nan)},
    {"x_test": np.zeros((12, 4, 5))},
    {"y_train": np.zeros(47, int)},
    {"y_train": np.zeros(48)},
    {"y_test": np.full(12, -1)},
    {"y_test": np.full(12, 1000)},
]


@pytest.mark.parametrize("changes", BAD_ARRAYS)
def test_bad_array_in_npz(capsys, tmp_path, changes):
    path = tmp_path / "data.npz"
    np.savez(path, **images(**changes))
    message = f"{path} must hold finite images of one shape in x_train and x_test, and"
    assert message in refusal(["--data", str(path)], capsys)


def test_npz_that_lacks_an_array(capsys, tmp_path):
    path = tmp_path / "data.npz"
    arrays = images()
    del arrays["y_test"]
    for y_test in ({}, {"y_test": np.array([None] * 12)}):
        np.savez(path, **arrays, **y_test)
        assert f"cannot read {path}: " in refusal(["--data", str(path)], capsys)


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros((3, 3)))
    return file.getvalue()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 truncated", npy()])
def test_file_that_is_no_npz(capsys, tmp_path, content):
    path = tmp_path / "data.npz"
    path.write_bytes(content)
    assert f"cannot read {path}: " in refusal(["--data", str(path)], capsys)


def test_digits(capsys, tmp_path):
    out = tmp_path / "new" / "folder" / "figure.png"
    assert digits.main(["--epochs", "1", "--batch-size", "64", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "losses and final weights bit for bit equal over 22 steps" in printed
    for name in digits.RUNS:
        assert f" {name} " in printed
    assert out.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_own_data(capsys, tmp_path, dtype):
    np.savez(tmp_path / "data.npz", **images())
    arguments = ["--data", str(tmp_path / "data.npz"), "--dtype", dtype]
    arguments += ["--epochs", "2", "--batch-size", "16"]
    arguments += ["--out", str(tmp_path / "figure.png")]
    assert digits.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"data.npz, {dtype}, 6 steps of 16" in printed
    if dtype == "float32":
        assert "bit for bit equal over 6 steps" in printed


def test_runs_take_each_step_in_turn(tmp_path, monkeypatch):
    calls = []

    def step(self, x, y):
        calls.append(self.name)
        whole(self, x, y)

    whole = digits.Run.step
    monkeypatch.setattr(digits.Run, "step", step)
    np.savez(tmp_path / "data.npz", **images())
    arguments = ["--data", str(tmp_path / "data.npz"), "--epochs", "2"]
    arguments += ["--batch-size", "16", "--out", str(tmp_path / "figure.png")]
    assert digits.main(arguments) == 0
    rounds = [tuple(calls[i : i + 4]) for i in range(0, len(calls), 4)]
    assert len(rounds) == 6
    assert all(set(names) == set(digits.RUNS) for names in rounds)
    assert len(set(rounds)) > 1


def test_one_ulp_apart_is_told_and_fails(capsys, tmp_path, monkeypatch):
    class Off(optim.AdaDelta):
        def apply_single(self, gradient, parameter, state):
            moved = super().apply_single(gradient, parameter, state)
            return moved * (1 + 2**-23)

    monkeypatch.setitem(digits.RUNS, "mlx-adadelta", (Off, False))
    np.savez(tmp_path / "data.npz", **images())
    arguments = ["--data", str(tmp_path / "data.npz"), "--epochs", "1"]
    arguments += ["--out", str(tmp_path / "figure.png")]
    assert digits.main(arguments) == 1
    printed = capsys.readouterr().out
    assert "losses and final weights differ by up to" in printed
    assert "equal" not in printed
