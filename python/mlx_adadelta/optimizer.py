"""The optimizer: stock's interface over :func:`adadelta_update`."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import mlx.core as mx
import mlx.optimizers
from mlx.nn.layers.base import Module
from mlx.utils import tree_flatten, tree_map

from .backend import Backend, resolve_backend
from .options import (
    NOT_NEGATIVE,
    Options,
    check_parameter,
    shown,
    to_optional_scalar,
    to_scalar,
)
from .tree import Aligned, check_root, check_scalars, check_state, check_states, rebuild
from .update import update_tensors


class AdaDelta(mlx.optimizers.AdaDelta, Options):
    r"""The AdaDelta optimizer (Zeiler 2012, arXiv:1212.5701), in one pass.

    In place of :class:`mlx.optimizers.AdaDelta`: the same names, the same state
    tree, in float32 on the CPU the same bits. What differs on purpose: a
    parameter keeps its own type under a wider gradient, lazily made state has
    the parameter's type rather than the gradient's, 16-bit parameters are
    computed in float32 and rounded once, and hyper-parameters that make no
    sense are refused, as is a loaded state that lacks a parameter.

    .. math::

        v_{t+1} &= \rho v_t + (1 - \rho) g_t^2 \\
        d_{t+1} &= \frac{\sqrt{u_t + \epsilon}}{\sqrt{v_{t+1} + \epsilon}} g_t \\
        u_{t+1} &= \rho u_t + (1 - \rho) d_{t+1}^2 \\
        w_{t+1} &= w_t - \lambda d_{t+1}

    Args:
        learning_rate (float, array or callable): The learning rate
            :math:`\lambda`, not negative, or a schedule that is called with the
            step and returns one.
        rho (float, optional): The decay :math:`\rho` of both running averages,
            in [0, 1]. Default: ``0.9``
        eps (float, optional): The positive term :math:`\epsilon` under the
            roots. Default: ``1e-6``
        weight_decay (float, optional): The weight decay :math:`\mu`, added to
            the gradient first, :math:`g_t + \mu w_t`. Default: ``0.0``
        decoupled_weight_decay (bool, optional): Take the decay from the
            parameter instead, :math:`w_t - \lambda \mu w_t`. Default: ``False``
        decay_filter (callable, optional): Says of a path and a parameter whether
            it decays, e.g. ``lambda path, w: w.ndim > 1``. Default: all decay
        maximize (bool, optional): Ascend. Default: ``False``
        state_dtype (Dtype, optional): The type of v and u: ``mx.float32``, the
            parameter's own type, or 16 bits beside float32 parameters (with
            ``stochastic_rounding``). Loaded state is converted at its first
            use. Default: the parameter's type, loaded state as it is
        stochastic_rounding (bool, optional): Round 16-bit results up or down
            at random, so that the mean is exact and small updates add up,
            instead of to the nearest. Default: ``False``
        seed (int, optional): The seed of the rounding. Default: ``0``
        backend (str, optional): ``"metal"``, ``"cpu"``, ``"mlx"``, or
            ``"auto"``: the environment variable ``MLX_ADADELTA_BACKEND`` where
            it is set, otherwise the kernel of the device in use, ``"mlx"``
            where there is none. Default: ``"auto"``

    Raises:
        TypeError, ValueError: A hyper-parameter is not as described.
        RuntimeError: The backend was asked for by name and cannot run here.
    """

    def __init__(
        self,
        learning_rate: float | mx.array | Callable[[mx.array], mx.array | float],
        rho: float = 0.9,
        eps: float = 1e-6,
        *,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        decay_filter: Callable[[str, mx.array], bool] | None = None,
        maximize: bool = False,
        state_dtype: mx.Dtype | None = None,
        stochastic_rounding: bool = False,
        seed: int = 0,
        backend: Backend = "auto",
    ) -> None:
        Options.__init__(
            self,
            *(rho, eps, weight_decay, decoupled_weight_decay, decay_filter),
            *(maximize, state_dtype, stochastic_rounding, seed, backend),
        )
        # Stock accepts arrays, too, but its annotation does not.
        super().__init__(learning_rate, rho, eps)  # type: ignore[arg-type]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "backend":
            resolve_backend(value)
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        rate = self._schedulers.get("learning_rate")
        if rate is None:
            try:
                rate = self.learning_rate.item()
            except ValueError:
                rate = "(traced)"  # has no value within a compiled function
        text = [f"learning_rate={getattr(rate, '__name__', rate)}"]
        for field in fields(Options):
            x = getattr(self, field.name)
            if repr(x) != repr(field.default):  # no mx.Dtype can be compared with None
                text.append(f"{field.name}={getattr(x, '__name__', repr(x))}")
        return f"{type(self).__name__}({', '.join(text)})"

    _loaded = False  # whether the state was ever assigned
    _scalars: tuple[str, ...] = ("step", "learning_rate")  # beside the parameters'
    _single = (0, "")  # index and path of the parameter of `apply_single`

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state, arrays only, ``"v"`` and ``"u"`` of each parameter.

        The next update checks assigned state against the parameters: it must
        hold every parameter that has a gradient, and none that the model
        lacks. :meth:`init`, called first, makes what is missing.
        """
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict but is {type(state).__name__}")
        self._initialized = False
        self._state = state
        self._loaded = True

    def _maybe_schedule(self, name: str, param: Any) -> None:
        if isinstance(param, (dict, list, tuple)):
            raise TypeError(
                f"{name} must be {NOT_NEGATIVE}, a scalar array or a schedule but is "
                f"{shown(param)}; parameters go to "
                "optimizer.init(model.trainable_parameters())"
            )
        if callable(param):
            self._schedulers[name] = param
            param = param(self.step)
        self._scalars = (*self._scalars, name)
        self.state[name] = to_scalar(name, param)

    @property
    def learning_rate(self) -> mx.array:
        """The learning rate, a scalar array; may be assigned a number."""
        return to_scalar("learning_rate", self.state["learning_rate"])

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.array) -> None:
        self.state["learning_rate"] = to_scalar("learning_rate", learning_rate)

    def init(self, parameters: Any) -> None:
        """Makes the state of each parameter that has none yet.

        Args:
            parameters (dict): A tree of parameters, such as
                ``model.trainable_parameters()``.
        """
        check_root(parameters, self._scalars)
        leaves: Any = tree_flatten(parameters)
        for path, parameter in leaves:
            check_parameter(path, parameter, self)
        check_scalars(self.state, self._scalars)
        check_states(self.state, parameters, self._is_plain(), whole=False)
        super().init(parameters)

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        """Makes one parameter's state: zeros of its shape, in the state's type."""
        for name in ("v", "u"):
            state[name] = mx.zeros(parameter.shape, self.state_dtype or parameter.dtype)

    def update(
        self,
        model: Module,
        gradients: Any,
        *,
        gradient_scale: float | mx.array | None = None,
        skip: bool | mx.array | None = None,
    ) -> None:
        """Applies the gradients to the model's parameters.

        Args:
            model (Module): The model, updated in place.
            gradients (dict): A tree of gradients.
            gradient_scale (float or array, optional): A scalar every gradient
                is multiplied by first, see :func:`clip_scale`.
            skip (bool or array, optional): A scalar; where it is true nothing
                changes: parameters, state, step and scheduled learning rate.
        """
        new = self.apply_gradients(
            gradients, model, gradient_scale=gradient_scale, skip=skip
        )
        model.update(new)

    def apply_gradients(
        self,
        gradients: Any,
        parameters: Any,
        *,
        gradient_scale: float | mx.array | None = None,
        skip: bool | mx.array | None = None,
    ) -> Any:
        """Applies the gradients; returns the new parameters, a tree like them.

        Args:
            gradients (dict): A tree of gradients.
            parameters (dict): A tree of parameters, which may hold more than
                the gradients.
            gradient_scale, skip: As in :meth:`update`.

        Raises:
            TypeError, ValueError: A gradient, a parameter or a state does not
                fit, named by its path. Nothing has changed then.
        """
        initialized = self._initialized
        if initialized and self._is_plain():
            return self._apply(gradients, parameters, gradient_scale, skip)
        before = tree_map(lambda x: x, self.state)
        try:
            if not initialized:
                self._init_lazily(gradients, parameters)
            return self._apply(gradients, parameters, gradient_scale, skip)
        except BaseException:  # Ctrl-C, too
            # In place: compiled functions hold on to this very dictionary.
            self.state.clear()
            self.state.update(before)
            self._initialized = initialized
            raise

    def _init_lazily(self, gradients: Any, parameters: Any) -> None:
        states = {k: x for k, x in self.state.items() if k not in self._scalars}
        if states or self._loaded:  # then nothing may be missing
            check_states(states, parameters, self._is_plain(), whole=True)
            Aligned(gradients, parameters, states).check_states(self._is_plain())
        aligned = Aligned(gradients, parameters, gradients)  # there is no state yet
        self.init(rebuild(gradients, iter(aligned.parameters)))

    def _apply(self, gradients: Any, parameters: Any, scale: Any, skip: Any) -> Any:
        # First of all, as in stock: a schedule may make an update of its own.
        changed = {
            name: to_scalar(name, schedule(self.step))
            for name, schedule in self._schedulers.items()
        }
        learning_rate = changed.get("learning_rate", self.learning_rate)
        changed["step"] = self.step + 1
        scale = to_optional_scalar("gradient_scale", scale)
        skip = to_optional_scalar("skip", skip)
        if skip is not None:
            changed = {
                name: mx.where(skip, self.state[name].astype(x.dtype), x)
                for name, x in changed.items()
            }
        aligned = Aligned(gradients, parameters, self.state)
        aligned.check_states(self._is_plain())
        if not self._is_plain():
            self.state.update(changed)
            new = self._apply_each(aligned, scale, skip)
            return rebuild(gradients, iter(new))
        old_v = [state["v"] for state in aligned.states]
        old_u = [state["u"] for state in aligned.states]
        new, new_v, new_u = update_tensors(
            (aligned.parameters, aligned.gradients, old_v, old_u),
            learning_rate,
            self,
            path=aligned.path,
            step=self.step,
            gradient_scale=scale,
            skip=skip,
        )
        self.state.update(changed)
        for state, v, u in zip(aligned.states, new_v, new_u, strict=True):
            state["v"], state["u"] = v, u
        return rebuild(gradients, iter(new))

    def _is_plain(self) -> bool:
        """Whether no subclass overrides :meth:`apply_single`."""
        return getattr(self.apply_single, "__func__", None) is AdaDelta.apply_single

    def _apply_each(self, aligned: Aligned, scale: Any, skip: Any) -> list[mx.array]:
        """Calls :meth:`apply_single` of a subclass, as stock does."""
        new = []
        columns = aligned.gradients, aligned.parameters, aligned.states
        for i, (g, w, state) in enumerate(zip(*columns, strict=True)):
            old = dict(state)
            self._single = (i, aligned.path(i))
            try:
                w_i = self.apply_single(g if scale is None else scale * g, w, state)
            finally:
                del self._single
            if skip is not None:
                w_i = mx.where(skip, w, w_i)
                state |= {k: mx.where(skip, x, state[k]) for k, x in old.items()}
            new.append(w_i)
        return new

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        """Updates one parameter; puts the new ``"v"`` and ``"u"`` into its state.

        Where a subclass overrides it, an update calls it for each parameter.
        """
        i, path = self._single
        check_state(None, state, exactly=False)
        [new], [state["v"]], [state["u"]] = update_tensors(
            ([parameter], [gradient], [state["v"]], [state["u"]]),
            self.learning_rate,
            self,
            path=lambda _: path,
            # Each parameter draws random bits of its own.
            step=self.step + mx.array(i << 32, mx.uint64) if i else self.step,
        )
        return new
