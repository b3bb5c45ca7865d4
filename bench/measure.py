"""Measures a case: all contenders are checked first, then timed in turns."""

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import psutil

from . import contenders
from .cases import Case, Data
from .contenders import MlxRunner, family
from .peers import CompiledTorch, NotCompiledError, Runner

# In every round, since ratios are taken within a round.
ANCHORS = ("limit", "floor", "ours")
# Floats a parameter that every round holds: the weight, the gradient in three
# libraries, the expected results, the limit's arrays, and one step's own.
WORKING = 1 + 3 + 3 + 4 + 6


@dataclass(frozen=True)
class Effort:
    """How long to measure: `repeats`, or as many as fit into `seconds` a round."""

    seconds: float
    least: int
    most: int
    sample: float  # seconds that one sample lasts at least
    repeats: int | None = None
    compile_seconds: int = 300  # that torch.compile may take

    def count(self, round_seconds: float) -> int:
        if self.repeats is not None:
            return self.repeats
        return int(np.clip(self.seconds / round_seconds, self.least, self.most))


QUICK = Effort(seconds=0.8, least=3, most=15, sample=0.002)
FULL = Effort(seconds=15, least=7, most=41, sample=0.05)


class WrongResultError(Exception):
    """A contender's results are not float64's."""


def check(runner: Runner, data: Data, expected: dict[str, Any]) -> None:
    """Steps a fresh runner; raises WrongResultError if a tensor is not float64's.

    Averages of squares below `least` are rounding: the gradient of an attention's key
    bias is zero, but for that.
    """
    runner.run(data.steps)
    if runner.rule is None:
        return
    if runner.rule not in expected:
        expected[runner.rule] = data.expected(runner.rule)
    pairs = zip(runner.result(), expected[runner.rule], strict=True)
    for i, (ours, theirs) in enumerate(pairs):
        for j, (x, y) in enumerate(zip(ours[: len(theirs)], theirs, strict=True)):
            least = data.tolerance * float(np.abs(y).max()) + data.least
            where = f"in array {j} of tensor {i}"
            try:
                np.testing.assert_allclose(
                    x, y, data.tolerance, least, err_msg=where, verbose=False
                )
            except AssertionError as error:
                raise WrongResultError(" ".join(str(error).split())) from None


def interleave(runners: dict[str, Runner], effort: Effort) -> dict[str, list[float]]:
    """Seconds a step: each repeat times every runner once, in a new order."""
    steps, round_seconds = {}, 0.0
    for name, runner in runners.items():
        step = runner.seconds(1)
        steps[name] = max(1, round(effort.sample / step))
        if steps[name] > 1:  # a step among many may be far faster than one alone
            step = runner.seconds(steps[name])
            steps[name] = max(1, round(effort.sample / step))
        round_seconds += steps[name] * step + runner.settle
    samples: dict[str, list[float]] = {name: [] for name in runners}
    order, shuffle = list(runners), random.Random(0).shuffle
    for _ in range(effort.count(round_seconds)):
        shuffle(order)
        for name in order:
            samples[name].append(runners[name].seconds(steps[name]))
            time.sleep(runners[name].settle)
    return samples


def spread(values: Any) -> dict[str, float]:
    q1, median, q3 = np.percentile(values, (25, 50, 75))
    return {"median": float(median), "q1": float(q1), "q3": float(q3)}


def ratio(times: list[float], base: list[float]) -> dict[str, float]:
    """The ratio of medians, and the quartiles of each repeat's own ratio."""
    pairs = spread(np.divide(times, base))
    return {**pairs, "median": float(np.median(times) / np.median(base))}


def measure(
    case: Case, names: list[str], effort: Effort, report: Callable[[str], None]
) -> dict[str, Any]:
    """Measures a case; `report` is told what it does.

    Contenders that do not fit into memory together are measured in rounds, each
    with the limit and this package among them.
    """
    report(f"{case.name}: making tensors")
    start = time.perf_counter()
    data = Data(case)
    available = 0.9 * psutil.virtual_memory().available - 4 * WORKING * data.size
    together = int(available / (12 * data.size)) - 1
    if together < 1:
        return {"name": case.name, "title": case.title, "skipped": "too little memory"}
    rivals = [name for name in names if name not in ANCHORS]
    anchors = [name for name in ANCHORS if name in names]
    rounds = [rivals[i : i + together] for i in range(0, len(rivals) or 1, together)]
    results: dict[str, dict[str, Any]] = {}
    for rival_names in rounds:
        members = anchors + rival_names
        runners: dict[str, Runner] = {}
        expected: dict[str, Any] = {}
        for name in members:
            report(f"{case.name}: checking {name}")
            runner = contenders.make(name, case, data)
            if isinstance(runner, CompiledTorch):
                runner.most_seconds = effort.compile_seconds
            try:
                check(runner, data, expected)
                runners[name] = runner
            except (WrongResultError, NotCompiledError) as error:
                word = "skipped" if isinstance(error, NotCompiledError) else "refused"
                results[name] = {"label": contenders.LABELS[name], word: str(error)}
        del expected
        report(f"{case.name}: timing {', '.join(runners)}")
        samples = interleave(runners, effort)
        for name, runner in runners.items():
            if name not in results:
                results[name] = summary(name, case, runner, samples, data.size)
        del runner, runners
        gc.collect()
        mx.clear_cache()
    return {
        "name": case.name,
        "title": case.title,
        "kind": "step" if case.model else "update",
        "parameters": data.size,
        "tensors": len(data.weights),
        "took_seconds": time.perf_counter() - start,
        "results": results,
    }


def summary(
    name: str, case: Case, runner: Runner, samples: dict[str, list[float]], size: int
) -> dict[str, Any]:
    times = samples[name]
    moved = contenders.step_bytes(name, case.dtype)
    result: dict[str, Any] = {
        "label": contenders.LABELS[name],
        "samples": len(times),
        "seconds": spread(times),
        "bytes": moved,
        "gb_s": moved * size / float(np.median(times)) / 1e9,
    }
    # The limit is the slower one of traffic and arithmetic; the norm's is traffic.
    limits = (contenders.limit_of(name), *["floor"] * (not name.endswith("-norm")))
    names = [x for x in limits if x in samples]
    if names and family(name) not in ("limit", "floor"):
        binding = max(names, key=lambda x: float(np.median(samples[x])))
        result["of_limit"] = ratio(samples[binding], times)
        result["bound"] = "arithmetic" if binding == "floor" else "memory"
    if isinstance(runner, CompiledTorch):
        result["compile_seconds"] = runner.compile_seconds
    if "ours" in samples:
        result["vs_ours"] = ratio(times, samples["ours"])
    forward = "torch-" * (family(name) == "torch") + "no-update"
    alone = samples.get(forward + "-compiled" * name.endswith("-compiled"))
    if alone and "no-update" not in name:
        alone_too = family(name) in ("limit", "floor")
        difference = times if alone_too else np.subtract(times, alone)
        result["update_seconds"] = spread(difference)
    if isinstance(runner, MlxRunner) and family(name) not in ("limit", "arrays"):
        result["peak_bytes"] = runner.peak()
    return result
