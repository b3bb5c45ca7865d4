"""Subclasses as people write them for stock: own updates, own schedules."""

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import pytest
from checks import assert_same_bits, assert_same_trees, unchanged
from models import decay, make_tree

from mlx_adadelta import AdaDelta


def clipping(base: type) -> type:
    """Clips each gradient and counts the calls, on stock or on this optimizer."""

    class Clipping(base):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.seen: list[Any] = []

        def apply_single(self, gradient: Any, parameter: Any, state: Any) -> Any:
            self.seen.append((parameter.shape, self.step.item(), self.learning_rate))
            return super().apply_single(mx.clip(gradient, -1, 1), parameter, state)

    return Clipping


def test_an_overridden_apply_single_is_called_as_stock_calls_it(backend: str) -> None:
    ours = clipping(AdaDelta)(decay, backend=backend)
    stock = clipping(optim.AdaDelta)(decay)
    results = []
    for optimizer in (ours, stock):
        parameters, *gradients = map(make_tree, range(3))
        for g in gradients:
            parameters = optimizer.apply_gradients(g, parameters)
        results.append([parameters, optimizer.state])
    assert_same_trees(backend, *results)
    assert [x[:2] for x in ours.seen] == [x[:2] for x in stock.seen]
    for (*_, x), (*_, y) in zip(ours.seen, stock.seen, strict=True):
        assert_same_bits(x, y)


def test_an_apply_single_set_on_the_optimizer_is_called() -> None:
    optimizer = AdaDelta(1.0)
    optimizer.apply_single = lambda g, w, state: w - g
    new = optimizer.apply_gradients({"w": mx.array(1.0)}, {"w": mx.array(3.0)})
    assert new["w"].item() == 2.0


def test_an_overridden_apply_single_knows_scale_skip_and_step(backend: str) -> None:
    w, g = map(make_tree, range(2))
    plain = AdaDelta(decay, backend=backend)
    ours = clipping(AdaDelta)(decay, backend=backend)
    small = mx.array(0.01)  # nothing is left to clip
    for skip in (False, True, mx.array(False)):
        args = {"gradient_scale": small, "skip": skip}
        results = [[o.apply_gradients(g, w, **args), o.state] for o in (ours, plain)]
        assert_same_trees(backend, *results)
    assert ours.step.item() == 2


def test_an_overridden_apply_single_may_keep_more_state(backend: str) -> None:
    class Counting(AdaDelta):
        def apply_single(self, gradient: Any, parameter: Any, state: Any) -> Any:
            state["count"] = state.get("count", mx.array(0)) + 1
            return super().apply_single(gradient, parameter, state)

    one = {"w": mx.ones(3)}
    optimizer = Counting(1.0, backend=backend)
    for skip in (False, True, None):
        optimizer.apply_gradients(one, one, skip=skip)
    assert optimizer.state["w"]["count"].item() == 2
    resumed = Counting(1.0, backend=backend)
    resumed.state = optimizer.state
    resumed.apply_gradients(one, one)
    assert resumed.state["w"]["count"].item() == 3


def test_an_overridden_apply_single_that_fails_changes_nothing(backend: str) -> None:
    class Failing(AdaDelta):
        def apply_single(self, gradient: Any, parameter: Any, state: Any) -> Any:
            new = super().apply_single(gradient, parameter, state)
            if parameter.ndim == 1:
                raise ArithmeticError
            return new

    w, g = map(make_tree, range(2))
    optimizer = Failing(decay, backend=backend)
    optimizer.init(w)
    with unchanged(optimizer.state), pytest.raises(ArithmeticError):
        optimizer.apply_gradients(g, w)


def test_an_overridden_apply_single_keeps_paths_and_random_bits_apart() -> None:
    seen = []

    def matrices(path: str, w: mx.array) -> bool:
        seen.append(path)
        return True

    optimizer = clipping(AdaDelta)(
        1.0, weight_decay=0.1, decay_filter=matrices, stochastic_rounding=True
    )
    x = mx.full((1000,), 1.003, mx.bfloat16)
    new = optimizer.apply_gradients({"a": x, "b": [x]}, {"a": x, "b": [x]})
    assert seen == ["a", "b.0"]
    assert not mx.array_equal(new["a"], new["b"][0]).item()
    with pytest.raises(ValueError, match=r"gradient of b\.0 must have"):
        optimizer.apply_gradients({"a": x, "b": [x[1:]]}, {"a": x, "b": [x]})


class Tempered(AdaDelta):
    """Puts a number of its own on a schedule, too."""

    def __init__(self, rate: Any, temperature: Any, **options: Any) -> None:
        super().__init__(rate, **options)
        self._maybe_schedule("temperature", temperature)


@pytest.mark.parametrize("rate", [0.5, decay], ids=["number", "schedule"])
@pytest.mark.parametrize("temperature", [3, lambda step: 3 - step, lambda step: 3.0])
def test_a_second_schedule(backend: str, rate: Any, temperature: Any) -> None:
    optimizer, plain = Tempered(rate, temperature, backend=backend), AdaDelta(rate)
    assert optimizer.state["temperature"].item() == 3
    (w, *gradients), results = map(make_tree, range(3)), []
    for o in (optimizer, plain):
        new = w
        for g in gradients:
            new = o.apply_gradients(g, new)
        results.append([new, o.state])
    seen = results[0][1].pop("temperature")
    assert isinstance(seen, mx.array)
    assert_same_trees(backend, *results)
    optimizer.state["temperature"] = seen
    # A checkpoint of it is taken as it was written.
    resumed = Tempered(rate, temperature, backend=backend)
    resumed.state = dict(optimizer.state)
    resumed.apply_gradients(w, w)
    assert resumed.step.item() == 3


def test_an_update_within_a_schedule_is_kept(backend: str) -> None:
    """As in stock, where the schedule runs before anything is read."""
    results = []
    for kind in (AdaDelta, optim.AdaDelta):
        nested = []

        def schedule(step: mx.array, nested: Any = nested) -> mx.array:
            if nested:
                optimizer, g, w = nested.pop()
                optimizer.apply_gradients(g, w)
            return mx.array(0.5)

        w, g, other = map(make_tree, range(3))
        optimizer = kind(schedule)
        optimizer.init(w)
        nested.append((optimizer, other, w))
        results.append([optimizer.apply_gradients(g, w), optimizer.state])
    assert results[0][1]["step"].item() == 2
    assert_same_trees("mlx", *results)
