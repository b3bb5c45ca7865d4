"""python -m mlx_adadelta.mlx_lm on a tiny random model with a tokenizer of its own."""

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import pytest
from checks import assert_same_bits
from mlx.utils import tree_flatten

pytestmark = pytest.mark.filterwarnings("default")
PAGE = Path(__file__).parents[2] / "docs/mlx_lm.md"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 64,
    "eos_token_id": 0,
}
TEXTS = ["the cat sat on the mat", "the cat ate six mice"]
COMMON = "--train --iters 4 --batch-size 1 --num-layers 2 --save-every 2"
Launch = Callable[..., Path]


@pytest.fixture(scope="module")
def lib() -> Iterator[SimpleNamespace]:
    names = {
        "lora": "mlx_lm.lora",
        "utils": "mlx_lm.utils",
        "llama": "mlx_lm.models.llama",
        "tokenizers": "tokenizers",
        "transformers": "transformers",
        "launcher": "mlx_adadelta.mlx_lm",
    }
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setenv("HF_HUB_OFFLINE", "1")
        reason = "mlx-lm is not installed"
        pytest.importorskip("mlx_lm", reason=reason)
        yield SimpleNamespace(
            **{key: pytest.importorskip(name) for key, name in names.items()}
        )


@pytest.fixture(scope="module")
def model(lib: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds a model, and another in 4 bits."""
    folder = tmp_path_factory.mktemp("model")
    words = ["<eos>", *sorted({word for text in TEXTS for word in text.split()})]
    numbers = {word: i for i, word in enumerate(words)}
    tokenizer = lib.tokenizers.Tokenizer(
        lib.tokenizers.models.WordLevel(numbers, "<eos>")
    )
    tokenizer.pre_tokenizer = lib.tokenizers.pre_tokenizers.Whitespace()
    mx.random.seed(0)
    made = lib.llama.Model(lib.llama.ModelArgs.from_dict(CONFIG))
    for name, config in (
        ("MODEL", CONFIG),
        ("4bit", {**CONFIG, "quantization": {"group_size": 32, "bits": 4}}),
    ):
        if name == "4bit":
            nn.quantize(made, **config["quantization"])
        lib.transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<eos>"
        ).save_pretrained(folder / name)
        weights = dict(tree_flatten(made.parameters()))
        mx.save_safetensors(str(folder / name / "model.safetensors"), weights)
        (folder / name / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def launch(
    lib: SimpleNamespace, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Launch]:
    """Trains in this process and returns the folder of the adapters."""
    # What a launch changes for its process.
    for name in ("build_parser", "train", "train_model"):
        monkeypatch.setattr(lib.lora, name, getattr(lib.lora, name))
    monkeypatch.setattr(lib.lora, "CONFIG_DEFAULTS", dict(lib.lora.CONFIG_DEFAULTS))
    block = lib.llama.TransformerBlock
    monkeypatch.setattr(block, "__call__", block.__call__)
    for name in ("train", "valid"):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    paths = ["--data", str(tmp_path), "--adapter-path"]

    def run(out: str, *arguments: str, weights: str = "MODEL") -> Path:
        folder = tmp_path / out
        argv = [*COMMON.split(), *paths, str(folder), "--model", str(model / weights)]
        monkeypatch.setattr(sys, "argv", ["mlx_lm", *argv, *arguments])
        lib.launcher.main()
        return folder

    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield run
    mx.set_default_device(device)


def load(path: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(path)))


@pytest.mark.parametrize(
    "arguments, weights",
    [
        ("", "MODEL"),
        ("", "4bit"),
        ("--fine-tune-type dora --grad-checkpoint", "MODEL"),
        ("--fine-tune-type full", "MODEL"),
        ("--grad-accumulation-steps 2", "MODEL"),
    ],
)
def test_trains(
    launch: Launch, lib: SimpleNamespace, model: Path, arguments: str, weights: str
) -> None:
    folder = launch("out", *arguments.split(), weights=weights)
    adapters = load(folder / "adapters.safetensors")
    state = load(folder / "adapters.optimizer.safetensors")
    assert state.pop("step").item() == (2 if "accumulation" in arguments else 4)
    assert state.pop("learning_rate").item() == 1
    assert set(state) == {f"{name}.{x}" for name in adapters for x in "vu"}
    assert all(mx.isfinite(x).all() for x in (adapters | state).values())
    before = load(folder / "0000002_adapters.safetensors")
    assert any(not mx.array_equal(adapters[name], before[name]) for name in before)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["optimizer"], config["learning_rate"]) == ("adadelta", 1)

    loaded, _ = lib.utils.load(str(model / weights), adapter_path=str(folder))
    found = dict(tree_flatten(loaded.parameters()))
    assert all(mx.array_equal(found[name], adapters[name]) for name in adapters)


def test_yaml_gives_the_options(launch: Launch, tmp_path: Path) -> None:
    options = "{rho: 0.5, state_dtype: bfloat16, stochastic_rounding: true}"
    path = tmp_path / "config.yaml"
    path.write_text(
        f"optimizer: adadelta\noptimizer_config: {{adadelta: {options}}}\n"
        "lr_schedule: {name: linear_schedule, arguments: [1.0, 0.0, 4]}\n"
    )
    folder = launch("out", "--config", str(path))
    state = load(folder / "adapters.optimizer.safetensors")
    assert state["learning_rate"].item() == 0.25
    assert {x.dtype for name, x in state.items() if name[-2:] == ".v"} == {mx.bfloat16}
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["optimizer_config"]["adadelta"]["rho"] == 0.5


@pytest.mark.parametrize(
    "setting, message",
    [
        ("optimizer: adam", "optimizer must be adadelta but is adam"),
        ("fine_tune_type: half", "unknown fine-tune-type half"),
    ],
)
def test_refused(launch: Launch, tmp_path: Path, setting: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(setting)
    with pytest.raises(ValueError, match=message):
        launch("out", "--config", str(path))
    assert not (tmp_path / "out").exists()


def test_resumes_with_the_state(
    launch: Launch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = launch("first") / "0000002_adapters.safetensors"
    state = adapters.with_suffix(".optimizer.safetensors")
    arguments = ["--iters", "2", "--learning-rate", "0.5"]
    arguments += ["--resume-adapter-file", str(adapters)]
    first = load(state)
    last = load(launch("second", *arguments) / "adapters.optimizer.safetensors")
    assert (first["step"].item(), last["step"].item()) == (2, 4)
    assert last["learning_rate"].item() == 0.5
    assert "begins anew" not in capsys.readouterr().out

    state.unlink()
    last = load(launch("third", *arguments) / "adapters.optimizer.safetensors")
    assert last["step"].item() == 2
    assert "begins anew" in capsys.readouterr().out


def test_same_bits_from_python_and_with_stock(
    launch: Launch, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    launched = load(launch("out", "--val-batches", "0") / "adapters.safetensors")
    monkeypatch.chdir(model)
    for package in ("mlx_adadelta", "mlx.optimizers"):
        exec(code.replace("from mlx_adadelta", f"from {package}"), {})
        found = load(model / "adapters.safetensors")
        assert found.keys() == launched.keys()
        for name, array in found.items():
            assert_same_bits(array, launched[name])
