"""Trajectories of torch.optim.Adadelta in float64.

Computed where torch is installed, else read from the file beside this one,
which `python tests/torch_reference.py` writes.
"""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE = Path(__file__).with_name("torch_reference.json")
STEPS = 50
CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"weight_decay": 0.05},
    {"maximize": True},
    {"weight_decay": 0.05, "maximize": True, "rho": 0.95, "eps": 1e-4},
]


def problem() -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """A parameter and the gradients of each step, exact in float32."""
    rng = np.random.default_rng(0)
    exact = lambda x: x.astype(np.float32).astype(np.float64)  # noqa: E731
    return exact(rng.normal(size=16)), [
        exact(rng.normal(size=16)) for _ in range(STEPS)
    ]


def compute(configuration: dict[str, Any]) -> list[float]:
    import torch  # noqa: PLC0415

    w, gradients = problem()
    parameter = torch.tensor(w, requires_grad=True)
    optimizer = torch.optim.Adadelta([parameter], lr=1.0, **configuration)
    for g in gradients:
        parameter.grad = torch.tensor(g)
        optimizer.step()
    return parameter.detach().tolist()


def trajectory(configuration: dict[str, Any]) -> list[float]:
    """The parameter after all steps."""
    if find_spec("torch"):
        return compute(configuration)
    stored: list[list[float]] = json.loads(FILE.read_text())
    return stored[CONFIGURATIONS.index(configuration)]


if __name__ == "__main__":
    FILE.write_text(json.dumps([compute(c) for c in CONFIGURATIONS], indent=1) + "\n")
