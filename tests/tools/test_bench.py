"""The benchmark's own logic; nothing here depends on how long anything takes."""

import copy
import json
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from bench import __main__ as bench
from bench import contenders, measure, pages, peers, report
from bench.cases import NARROW, Case, Data, Tensor, all_cases, loss, mlp_model

SHAPES = (Tensor((8, 4), transposed=True), Tensor((5,)), Tensor((3, 2, 2, 3)))
TINY = Case("tiny", "three tensors", SHAPES)
TINY_NARROW = {
    str(dtype): Case(f"tiny-{dtype}", "three tensors", SHAPES, dtype=dtype)
    for dtype in (mx.bfloat16, mx.float16)
}
# PyTorch warns of its own code when it is imported and when it compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning"),
]
TINY_MODEL = Case("tiny-model", "two layers", model=lambda: mlp_model(1, 4))


def is_transposed(gradient: mx.array) -> bool:
    strides = np.array(gradient, copy=False).strides
    return gradient.ndim == 2 and strides[0] < strides[1]


@pytest.mark.parametrize(
    "name, parameters, tensors",
    [
        ("large", 2 * 4096**2, 2),
        ("transformer", 124_439_808, 148),  # GPT-2's number
        ("lora", 300 * 16 * 1024, 300),
        ("small", 32_000, 500),
        ("resnet50", 25_557_032, 161),  # torchvision's numbers
        ("sweep-26", 2**26, 1),
    ],
)
def test_cases_have_the_known_sizes(name: str, parameters: int, tensors: int) -> None:
    shapes = [tensor.shape for tensor in all_cases(quick=False)[name].tensors]
    assert (sum(map(np.prod, shapes)), len(shapes)) == (parameters, tensors)


def test_gradients_lie_as_a_backward_pass_leaves_them() -> None:
    model, x, y = all_cases(quick=True)["step-gpt2"].model()
    _, gradients = nn.value_and_grad(model, loss)(model, x, y)
    mx.eval(gradients)
    real = {(tuple(g.shape), is_transposed(g)) for _, g in tree_flatten(gradients)}
    case = all_cases(quick=True)["transformer"]
    for tensor, g in zip(
        case.tensors, Data(case).mlx_gradients().values(), strict=True
    ):
        assert is_transposed(g) == tensor.transposed
        other = (tensor.shape, not tensor.transposed)
        assert other not in real


@pytest.mark.parametrize("name", contenders.LABELS)
def test_contenders_agree_with_float64(name: str) -> None:
    if why := contenders.missing(name):
        pytest.skip(why)
    whole = "no-update" in name or "matched" in name
    case = TINY_MODEL if whole else TINY
    if name.startswith(("ours-wide", "ours-st", "limit-")):
        case = TINY_NARROW[str(mx.bfloat16)]
    data = Data(case)
    runner = contenders.make(name, case, data)
    expected: dict[str, object] = {}
    measure.check(runner, data, expected)
    assert len(expected) == (runner.rule is not None)


@pytest.mark.parametrize("dtype", TINY_NARROW)
@pytest.mark.parametrize("name", NARROW)
def test_16_bits_agree_with_float64(name: str, dtype: str) -> None:
    if why := contenders.missing(name):
        pytest.skip(why)
    case = TINY_NARROW[dtype]
    data = Data(case)
    runner = contenders.make(name, case, data)
    measure.check(runner, data, {})
    state = runner.result()[0][1]
    held = mx.array(state)
    rounded = mx.array_equal(held.astype(case.dtype).astype(mx.float32), held)
    assert rounded.item() == (contenders.kept_types(name, case.dtype)[1] == case.dtype)


@pytest.mark.parametrize("name", ["step-gpt2", "step-mlp"])
def test_a_whole_step_of_pytorch_agrees_with_float64(name: str) -> None:
    if why := contenders.missing("torch-foreach"):
        pytest.skip(why)
    case = all_cases(quick=True)[name]
    data = Data(case)
    measure.check(contenders.make("torch-foreach", case, data), data, {})


def test_bytes_of_a_step() -> None:
    names = ("ours-stochastic", "ours-wide", "ours-float32", "ours-state")
    moved = [contenders.step_bytes(name, mx.bfloat16) for name in names]
    assert moved == [14, 22, 28, 20]
    limits = [contenders.limit_of(name) for name in names]
    assert limits == ["limit", "limit-wide", "limit-float32", "limit-state"]
    assert [contenders.step_bytes(x, mx.bfloat16) for x in limits] == moved
    assert contenders.step_bytes("stock-compiled", mx.float32) == 28
    for name in ("ours-norm", contenders.limit_of("ours-norm")):
        assert contenders.step_bytes(name, mx.float32) == 4
        assert name.endswith("-norm")


def test_a_wrong_contender_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = contenders.Update.result

    def result(self: contenders.Update) -> list[tuple[np.ndarray, ...]]:
        if self.update == self.eager:
            return real(self)
        (w, v, u), *others = real(self)
        u[-1, -1] *= 1.01
        return [(w, v, u), *others]

    monkeypatch.setattr(contenders.Update, "result", result)
    monkeypatch.setattr(bench, "all_cases", lambda quick: {"tiny": TINY})
    options = ["--case", "tiny", "--contender", "stock,stock-compiled"]
    options += ["--repeats", "1", "--out", str(tmp_path)]
    assert bench.main(options) == 1
    assert (
        "in array 2 of tensor 0 Mismatched elements: 1 / 32" in capsys.readouterr().out
    )
    record = json.loads((tmp_path / "bench.json").read_text())
    results = record["cases"][0]["results"]
    assert results["stock-compiled"].keys() == {"label", "refused"}
    assert results["stock"]["seconds"]["median"] > 0


def test_one_that_compiles_too_long_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(self: peers.Torch, steps: int) -> None:
        time.sleep(10)

    monkeypatch.setattr(peers.Torch, "run", run)
    monkeypatch.setattr(peers.CompiledTorch, "__init__", lambda *_: None)
    monkeypatch.setattr(contenders, "missing", lambda name: "")
    monkeypatch.setattr(bench, "missing", lambda *_: "")
    monkeypatch.setattr(bench, "all_cases", lambda quick: {"tiny": TINY})
    options = ["--contender", "torch-loop-compiled", "--repeats", "1"]
    options += ["--compile-seconds", "1", "--case", "tiny", "--out", str(tmp_path)]
    assert bench.main(options) == 0
    record = json.loads((tmp_path / "bench.json").read_text())
    result = record["cases"][0]["results"]["torch-loop-compiled"]
    assert result["skipped"] == "not compiled within 1 s"
    assert "not compiled within" in (tmp_path / "bench.md").read_text()


def measured(tmp_path: Path, *options: str) -> dict:
    common = ["--quick", "--contender", "stock", "--repeats", "2"]
    assert bench.main([*common, *options, "--out", str(tmp_path)]) == 0
    return json.loads((tmp_path / "bench.json").read_text())


def test_a_run_is_recorded_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = ["--case", "small", "--case", "sweep-08,sweep-12"]
    old = measured(tmp_path, *cases)
    for name in ("bench.md", "sweep.png", "ratios.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert old["machine"]["processor"] and old["versions"]["mlx"]
    small = old["cases"][0]
    assert small["results"]["ours"]["bound"] in ("memory", "arithmetic")
    assert (small["parameters"], small["tensors"]) == (32_000, 500)
    assert small["results"]["ours"]["vs_ours"]["median"] == 1

    # Two repeats alone may lie far apart.
    old["cases"][0]["results"]["stock"]["of_limit"] = {
        "median": 0.5,
        "q1": 0.4,
        "q3": 0.6,
    }
    new = copy.deepcopy(old)
    stock = new["cases"][0]["results"]["stock"]
    for key in stock["of_limit"]:
        stock["of_limit"][key] /= 4
    moved = [row for row in report.compare(old, new) if row[-1]]
    assert [(row[0], row[-2], row[-1]) for row in moved] == [
        ("small", "4.00", "slower")
    ]
    new["cases"][0]["parameters"] += 1
    assert report.compare(old, new)[0][2] == "other shapes: not comparable"

    capsys.readouterr()
    measured(tmp_path, "--case", "sweep-08", "--compare", str(tmp_path / "bench.json"))
    assert "of 2 moved" in capsys.readouterr().out


def test_cases_can_be_measured_one_by_one(tmp_path: Path) -> None:
    measured(tmp_path, "--case", "sweep-12")
    record = measured(tmp_path, "--case", "small", "--keep")
    assert [case["name"] for case in record["cases"]] == ["small", "sweep-12"]
    again = measured(tmp_path, "--case", "small", "--keep")
    assert [case["name"] for case in again["cases"]] == ["small", "sweep-12"]
    assert again["cases"][0] != record["cases"][0]
    assert again["cases"][1] == record["cases"][1]
    taken = [note for note in again["notes"] if note.startswith("small: took")]
    assert len(taken) == 1
    text = (tmp_path / "bench.md").read_text()
    assert "## small: 500" in text and "## sweep-12: 2^12" in text

    again["versions"]["mlx"] = "0.1"
    (tmp_path / "bench.json").write_text(json.dumps(again))
    with pytest.raises(SystemExit):
        measured(tmp_path, "--case", "small", "--keep")


def test_one_command_fills_in_the_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cases = {name: replace(TINY, name=name) for name in pages.README}
    cases["sweep-02"] = Case("sweep-02", "2^2", (Tensor((4,)),))
    cases["sweep-03"] = Case("sweep-03", "2^3", (Tensor((8,)),))
    monkeypatch.setattr(bench, "all_cases", lambda quick: cases)
    monkeypatch.setattr(measure, "FULL", measure.QUICK)
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/benchmarks.md"):
        (tmp_path / name).write_text((pages.ROOT / name).read_text())
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    out = ["--out", str(tmp_path / "out"), "--repeats", "1", "--contender", "stock"]
    assert bench.main(["--pages", *out]) == 0
    readme, docs = (
        (tmp_path / x).read_text() for x in ("README.md", "docs/benchmarks.md")
    )
    for name in pages.README:
        assert f"| {name}: three tensors" in readme
        assert f"| {name}: three tensors" in docs
        assert f"## {name}: three tensors, 73 parameters" in docs
    assert "## sweep-03" not in docs and "took" in docs
    for name in ("ratios", "sweep"):
        assert (tmp_path / f"docs/{name}.png").stat().st_size > 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["--case", "huge"], "--case: 'huge' is none of large, transformer"),
        (["--contender", "sgdm"], "--contender: 'sgdm' is none of limit, limit-wide"),
        (["--repeats", "0"], "--repeats: expected a positive integer, got '0'"),
        (["--compare", "none.json"], "--compare: none.json is no record"),
        (["--pages", "--case", "large"], "--pages: the record must hold large, tr"),
        (["--pages", "--quick"], "--pages: the record must hold large, transformer"),
        (["--out", __file__], "File exists"),
    ],
)
def test_bad_options_are_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.main(options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_what_is_absent_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find = contenders.importlib.util.find_spec
    monkeypatch.setattr(
        contenders.importlib.util,
        "find_spec",
        lambda name: None if name == "torch" else find(name),
    )
    record = measured(tmp_path, "--case", "sweep-08", "--contender", "torch-foreach")
    assert (
        "PyTorch Adadelta, foreach: not measured, torch is not installed."
        in (record["notes"])
    )
    assert "torch-foreach" not in record["cases"][0]["results"]
