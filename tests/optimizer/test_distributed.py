"""The examples on two ranks, launched as users do; and a rank that is lost."""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from checks import assert_same_bits

EXAMPLES = Path(__file__).parents[2] / "examples"
LAUNCH = (
    *(sys.executable, "-c", "from mlx._distributed_utils.launch import main; main()"),
    *("-n", "2", "--backend", "ring", "--python", sys.executable),
)


def run(command: list[str]) -> str:
    """What the launcher and its ranks print; none of them outlives this."""
    # The launcher spins where its input has ended, so it is left open.
    reading, writing = os.pipe()
    with subprocess.Popen(
        command,
        stdin=reading,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Its files are made there, by commands that no space may be in.
        env=os.environ | {"TMPDIR": "/tmp"},
    ) as launcher:
        try:
            return launcher.communicate(timeout=300)[0]
        except subprocess.TimeoutExpired:
            os.killpg(launcher.pid, signal.SIGKILL)
            raise
        finally:
            os.close(reading)
            os.close(writing)


def launch(script: Path, *arguments: str) -> str:
    """What two ranks print; anew where somebody else has their ports."""
    for _ in range(5):
        # Below those the system hands out by itself.
        port = random.randrange(10000, 30000, 2)
        output = run([*LAUNCH, "--starting-port", str(port), str(script), *arguments])
        if "Couldn't bind socket" not in output:
            return output
    raise OSError("no free ports found")


def weights(folder: Path, rank: int) -> dict[str, mx.array]:
    return dict(mx.load(str(folder / f"rank{rank}.safetensors")))


def state_bytes(output: str) -> list[int]:
    found = re.findall(r"rank (\d) of 2: .*, (\d+) bytes of state", output)
    assert sorted(rank for rank, _ in found) == ["0", "1"], output
    return [int(size) for _, size in found]


def test_ranks_agree_with_each_other_and_with_one_process(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("alone", "parallel", "sharded")]
    for folder in folders:
        folder.mkdir()
    alone, parallel, sharded = folders
    subprocess.run(
        [sys.executable, EXAMPLES / "data_parallel.py", "--save", alone],
        timeout=300,
        check=True,
    )
    whole = state_bytes(launch(EXAMPLES / "data_parallel.py", "--save", str(parallel)))
    shares = state_bytes(launch(EXAMPLES / "sharded_state.py", "--save", str(sharded)))
    expected = weights(alone, 0)
    first = weights(parallel, 0)
    for path, w in first.items():
        for other in (weights(parallel, 1), weights(sharded, 0), weights(sharded, 1)):
            assert_same_bits(other[path], w, path)
        # The mean of two halves' means is rounded otherwise than that of all.
        np.testing.assert_allclose(w, expected[path], rtol=1e-4, atol=1e-5)
        assert not np.array_equal(w, mx.zeros_like(w))
    assert sum(shares) == whole[0] == whole[1]
    assert max(shares) < 0.55 * whole[0]


LOST = """
import os, signal, sys, time
sys.path.insert(0, {examples!r})
import data_parallel

make_batch = data_parallel.make_batch

def lose_a_rank(step):
    if step == 5 and os.environ["MLX_RANK"] == "1":
        print("rank 1 is lost", flush=True)
        {how}
    return make_batch(step)

data_parallel.make_batch = lose_a_rank
data_parallel.main()
"""


@pytest.mark.parametrize(
    ("how", "message"),
    [
        # The launcher may end the other before it has said anything.
        ("os.kill(os.getpid(), signal.SIGKILL)", "Node with rank 0 "),
        ("sys.exit(0)", "connection to a peer was lost"),
        ("time.sleep(1000)", "Timeout"),
    ],
    ids=["killed", "left", "hangs"],
)
def test_a_lost_rank_is_an_error(tmp_path: Path, how: str, message: str) -> None:
    script = tmp_path / "lost.py"
    script.write_text(LOST.format(examples=str(EXAMPLES), how=how))
    output = launch(script, "--timeout", "15" if "sleep" in how else "250")
    assert "rank 1 is lost" in output
    assert message in output
    assert "bytes of state" not in output
