"""Many steps on changing shapes leave memory as it was."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# In a process of its own: what other tests leave behind does not count.
STEPS = """
import gc, json, random, sys
import mlx.core as mx
import psutil
from mlx_adadelta import AdaDelta

mx.set_default_device(mx.cpu)
mx.set_cache_limit(0)  # a buffer from the cache may be larger than its array
backend, steps = sys.argv[1], int(sys.argv[2])
choose = random.Random(0)
process = psutil.Process()
kept = {"kept": mx.ones((70, 33))}
optimizer = AdaDelta(1.0, backend=backend)
optimizer.init(kept)

def step(tensors):
    # The kept tensor goes on; the others come and go, some transposed.
    shapes = [(choose.randint(1, 90), choose.randint(1, 90)) for _ in range(tensors)]
    w = {str(i): mx.ones(shape) for i, shape in enumerate(shapes)}
    g = {name: mx.ones(x.shape[::-1]).T for name, x in w.items()}
    optimizer.init(w)
    w["kept"] = kept["kept"]
    g["kept"] = mx.ones((33, 70)).T
    new = optimizer.apply_gradients(g, w)
    mx.eval(new, optimizer.state)
    kept["kept"] = new["kept"]
    for name in list(w):
        if name != "kept":
            del optimizer.state[name]
    optimizer._initialized = False

def measure():
    gc.collect()
    mx.synchronize()  # the stream's thread frees what a step used after its end
    return mx.get_active_memory(), process.memory_info().rss

for _ in range(steps // 5):
    step(5)
before = measure()
for _ in range(steps):
    step(5)
print(json.dumps([before, measure()]))
"""
LEEWAY = 4 << 20  # bytes: malloc's own unrest, 400 a step of the long run


@pytest.mark.parametrize("backend", ["cpu", "mlx"])
@pytest.mark.parametrize(
    "steps", [1000, pytest.param(10_000, marks=pytest.mark.long)], ids=str
)
def test_memory_stays_flat(backend: str, steps: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STEPS, backend, str(steps)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (active, resident), (active_after, resident_after) = json.loads(done.stdout)
    assert active_after == active
    print(f"resident memory grew by {resident_after - resident} bytes")
    assert resident_after - resident < LEEWAY
