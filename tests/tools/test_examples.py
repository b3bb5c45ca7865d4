"""The examples, run as a reader would, with tiny arguments."""

import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, folder: Path, *arguments: str) -> tuple[float, float]:
    """The first and the last loss it prints."""
    command = [sys.executable, "-W", "error", EXAMPLES / name, *arguments]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, check=True)
    found = re.fullmatch(rb"loss (\S+) to (\S+), see .*\n", done.stdout)
    assert found
    return float(found[1]), float(found[2])


def test_lora_finetune_resumes_exactly(tmp_path: Path) -> None:
    size = ("--batch-size", "4")
    whole = ("--checkpoint", "whole.safetensors")
    first, last = run("lora_finetune.py", tmp_path, "--steps", "8", *size, *whole)
    assert last < first
    run("lora_finetune.py", tmp_path, "--steps", "3", *size)
    resumed = run("lora_finetune.py", tmp_path, "--steps", "8", *size, "--resume")
    assert resumed[1] == last

    command = [sys.executable, "-W", "error", EXAMPLES / "lora_finetune.py", "--resume"]
    done = subprocess.run(
        [*command, "--steps", "8"], cwd=tmp_path, capture_output=True, check=True
    )
    assert done.stdout == b"all 8 steps are done: raise --steps to go on\n"

    a, b = (mx.load(str(tmp_path / f"{x}.safetensors")) for x in ("whole", "lora"))
    assert a.keys() == b.keys()
    adapters = {key.split(".")[-1] for key in a if key.startswith("adapters.")}
    assert adapters == {"lora_a", "lora_b"}  # the base is frozen
    assert all(mx.array_equal(a[key], b[key]) for key in a)
    assert (tmp_path / "lora.png").stat().st_size > 0


def test_vae_learns(tmp_path: Path) -> None:
    first, last = run("vae.py", tmp_path, "--epochs", "1")
    assert last < 0.8 * first
    assert (tmp_path / "vae.png").stat().st_size > 0
