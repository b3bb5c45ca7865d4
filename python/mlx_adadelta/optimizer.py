"""The optimizer: stock's interface over :func:`adadelta_update`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers
from mlx.nn.layers.base import Module
from mlx.utils import tree_map

from .backend import Backend, resolve_backend
from .options import (
    NOT_NEGATIVE,
    Options,
    check_gradient_scale,
    check_learning_rate,
    check_parameter,
    check_scalar,
    check_skip,
    shown,
)
from .tree import (
    Aligned,
    check_known,
    check_state,
    check_states,
    rebuild,
)
from .update import update_tensors


class AdaDelta(mlx.optimizers.AdaDelta, Options):
    r"""The AdaDelta optimizer [1], each parameter updated in one pass.

    In place of :class:`mlx.optimizers.AdaDelta`: the same names, the same state
    tree, in float32 on the CPU the same bits. What differs on purpose: a
    parameter keeps its own type under a wider gradient, lazily made state has
    the parameter's type rather than the gradient's, 16-bit parameters are
    computed in float32 and rounded once, and hyper-parameters that make no
    sense are refused, as is a loaded state that lacks a parameter.

    [1]: Zeiler, M.D., 2012. ADADELTA: an adaptive learning rate method. arXiv
    preprint arXiv:1212.5701.

    .. math::

        v_{t+1} &= \rho v_t + (1 - \rho) g_t^2 \\
        d_{t+1} &= \frac{\sqrt{u_t + \epsilon}}{\sqrt{v_{t+1} + \epsilon}} g_t \\
        u_{t+1} &= \rho u_t + (1 - \rho) d_{t+1}^2 \\
        w_{t+1} &= w_t - \lambda d_{t+1}

    Args:
        learning_rate (float, array or callable): The learning rate
            :math:`\lambda`: a number that is not negative, a scalar array, or a
            schedule, called with the step and returning either.
        rho (float, optional): The decay :math:`\rho` of both running averages,
            in [0, 1]. Default: ``0.9``
        eps (float, optional): The positive term :math:`\epsilon` added under
            the roots. Default: ``1e-6``
        weight_decay (float, optional): The weight decay :math:`\mu`, added to
            the gradient before everything else, :math:`g_t + \mu w_t`, as in
            PyTorch. Default: ``0.0``
        decoupled_weight_decay (bool, optional): Take the decay from the
            parameter instead, :math:`w_t - \lambda \mu w_t`, as AdamW does.
            Default: ``False``
        decay_filter (callable, optional): Called with a parameter's path and
            the parameter, says whether it decays, e.g.
            ``lambda path, w: w.ndim > 1``. Default: all decay
        maximize (bool, optional): Ascend: the gradient is negated first.
            Default: ``False``
        state_dtype (Dtype, optional): The type of v and u: ``mx.float32``, the
            parameter's own type, or 16 bits beside float32 parameters (take
            ``stochastic_rounding`` then). Loaded state of another type is
            converted at its first use. Default: the parameter's type for new
            state, loaded state as it is
        stochastic_rounding (bool, optional): Round 16-bit results up or down
            at random, so that the mean is exact, instead of to the nearest:
            small updates then add up. Default: ``False``
        seed (int, optional): The seed of the rounding. Default: ``0``
        backend (str, optional): ``"metal"``, ``"cpu"``, ``"mlx"``, or
            ``"auto"``: what the environment variable ``MLX_ADADELTA_BACKEND``
            names, where it is set, otherwise the native kernel of the device
            in use, ``"mlx"`` where there is none. Default: ``"auto"``

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
        self.backend = backend
        Options.__init__(
            self,
            rho=rho,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            decay_filter=decay_filter,
            maximize=maximize,
            state_dtype=state_dtype,
            stochastic_rounding=stochastic_rounding,
            seed=seed,
        )
        # Stock's annotation leaves out what its code accepts: arrays.
        rate: Any = learning_rate
        super().__init__(rate, rho, eps)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "backend":
            resolve_backend(value)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        # An mx.Dtype can be neither copied nor pickled.
        dtype = self.state_dtype
        name = None if dtype is None else str(dtype).rpartition(".")[-1]
        return {**self.__dict__, "state_dtype": name}

    def __setstate__(self, state: dict[str, Any]) -> None:
        name = state["state_dtype"]
        self.__dict__.update(state)
        self.state_dtype = None if name is None else getattr(mx, name)

    def __repr__(self) -> str:
        rate = self._schedulers.get("learning_rate")
        if rate is None:
            try:
                rate = self.learning_rate.item()
            except ValueError:
                rate = "(traced)"  # has no value within a compiled function
        options = {"learning_rate": rate, **self.changed()}
        if self.backend != "auto":
            options["backend"] = repr(self.backend)
        text = (f"{k}={getattr(x, '__name__', x)}" for k, x in options.items())
        return f"{type(self).__name__}({', '.join(text)})"

    # Whether the state was ever assigned; looked at where it is not initialized.
    _loaded = False
    # What the state holds besides the parameters' states.
    _scalars: tuple[str, ...] = ("step", "learning_rate")
    # What `apply_single` is called for: an index and a path.
    _single = (0, "")

    @property
    def state(self) -> dict[str, Any]:
        """The optimizer's state, arrays only, ``"v"`` and ``"u"`` of each parameter.

        The next update checks assigned state against the parameters: it must
        hold every parameter that has a gradient, and none that the model
        lacks. :meth:`init`, called first, makes what is missing.
        """
        state: dict[str, Any] = self._state
        return state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        if not isinstance(state, dict):
            raise TypeError(f"state must be a dict but is {type(state).__name__}")
        self._initialized = False
        self._state = state
        self._loaded = True

    def _check_scalars(self) -> None:
        for name in self._scalars:
            if name not in self.state:
                raise ValueError(f"the optimizer's state holds no {name}")
        for name in ("step", "learning_rate"):
            x = self.state[name]
            if not isinstance(x, mx.array):
                raise TypeError(f"{name} must be a scalar array but is {shown(x)}")
            check_scalar(name, x)
        if not mx.issubdtype(self.step.dtype, mx.integer):
            raise TypeError(f"step must be an integer but is {self.step.dtype}")
        if mx.issubdtype(self.step.dtype, mx.signedinteger) and self.step.item() < 0:
            raise ValueError(f"step must not be negative but is {self.step.item()}")

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
        self.state[name] = self._scheduled(name, param)

    def _scheduled(self, name: str, value: Any) -> mx.array:
        return (
            check_learning_rate(value) if name == "learning_rate" else mx.array(value)
        )

    @property
    def learning_rate(self) -> mx.array:
        """The learning rate, a scalar array; may be assigned a number."""
        if "learning_rate" not in self.state:
            raise ValueError("the optimizer's state holds no learning_rate")
        return check_learning_rate(self.state["learning_rate"])

    @learning_rate.setter
    def learning_rate(self, learning_rate: float | mx.array) -> None:
        self.state["learning_rate"] = check_learning_rate(learning_rate)

    def init(self, parameters: Any) -> None:
        """Makes the state of each parameter that has none yet.

        Args:
            parameters (dict): A tree of parameters.

        Raises:
            TypeError, ValueError: A parameter cannot be trained, or the state
                that there is does not fit, named by its path. Nothing has
                changed then.
        """
        if not isinstance(parameters, dict):
            raise TypeError(
                "parameters (root) must be a dict, such as "
                f"model.trainable_parameters(), but is {type(parameters).__name__}"
            )
        for name in self._scalars:
            if name in parameters:
                raise ValueError(
                    f"parameter {name} must have another name: the optimizer's state "
                    f"keeps its own {name} there"
                )
        aligned = Aligned(parameters)
        for i, parameter in enumerate(aligned.gradients):
            check_parameter(aligned.path(i), parameter, self)
        if self._loaded:
            self._check_scalars()
        check_states(self.state, aligned.places, False, not self._is_overridden())
        super().init(parameters)

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        """Makes one parameter's state: zeros of its shape, in the state's type."""
        state["v"] = mx.zeros(parameter.shape, self.state_dtype or parameter.dtype)
        state["u"] = mx.zeros(parameter.shape, self.state_dtype or parameter.dtype)

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
        model.update(
            self.apply_gradients(
                gradients, model, gradient_scale=gradient_scale, skip=skip
            )
        )

    def apply_gradients(
        self,
        gradients: Any,
        parameters: Any,
        *,
        gradient_scale: float | mx.array | None = None,
        skip: bool | mx.array | None = None,
    ) -> Any:
        """Applies the gradients and returns the new parameters.

        Args:
            gradients (dict): A tree of gradients.
            parameters (dict): A tree of parameters, which may hold more than
                the gradients.
            gradient_scale (float or array, optional): As in :meth:`update`.
            skip (bool or array, optional): As in :meth:`update`.

        Returns:
            dict: The new parameters, a tree like ``gradients``.

        Raises:
            TypeError, ValueError: A gradient, a parameter or a state does not
                fit, named by its path. Nothing has changed then.
        """
        if self._initialized:
            return self._apply(gradients, parameters, gradient_scale, skip)
        before = tree_map(lambda x: x, self.state)
        try:
            aligned = Aligned(gradients, parameter=parameters)
            states = {k: x for k, x in self.state.items() if k not in self._scalars}
            if self._loaded:
                check_known(states, parameters, None)
            if self._loaded or states:
                exactly = not self._is_overridden()
                check_states(self.state, aligned.places, True, exactly)
            self.init(rebuild(gradients, iter(aligned.columns["parameter"])))
            return self._apply(gradients, parameters, gradient_scale, skip)
        except BaseException:  # Ctrl-C, too
            # In place: compiled functions hold on to this very dictionary.
            self.state.clear()
            self.state.update(before)
            self._initialized = False
            raise

    def _apply(
        self, gradients: Any, parameters: Any, gradient_scale: Any, skip: Any
    ) -> Any:
        # First of all, as in stock: a schedule may itself make an update.
        changed = {
            name: self._scheduled(name, schedule(self.step))
            for name, schedule in self._schedulers.items()
        }
        learning_rate = changed.get("learning_rate", self.learning_rate)
        changed["step"] = self.step + 1
        if gradient_scale is not None:
            gradient_scale = check_gradient_scale(gradient_scale)
        if skip is not None:
            skip = check_skip(skip)
            changed = {
                name: mx.where(skip, self.state[name].astype(x.dtype), x)
                for name, x in changed.items()
            }
        aligned = Aligned(gradients, parameter=parameters, state=self.state)
        if self._is_overridden():
            new = self._apply_each(aligned, changed, gradient_scale, skip)
            return rebuild(gradients, iter(new))

        states = aligned.columns["state"]
        v, u = [], []
        for place, state in zip(aligned.places, states, strict=True):
            check_state(place, state)
            v.append(state["v"])
            u.append(state["u"])
        new, new_v, new_u = update_tensors(
            aligned.columns["parameter"],
            aligned.gradients,
            v,
            u,
            learning_rate,
            self,
            path=aligned.path,
            step=self.step,
            gradient_scale=gradient_scale,
            skip=skip,
            backend=self.backend,
        )
        self.state.update(changed)
        for state, v_i, u_i in zip(states, new_v, new_u, strict=True):
            state["v"] = v_i
            state["u"] = u_i
        return rebuild(gradients, iter(new))

    def _is_overridden(self) -> bool:
        function = getattr(self.apply_single, "__func__", None)
        return function is not AdaDelta.apply_single

    def _apply_each(
        self, aligned: Aligned, changed: Any, gradient_scale: Any, skip: Any
    ) -> list[mx.array]:
        """Calls `apply_single` for each parameter, as stock does."""
        before, states, new = dict(self.state), [], []
        self.state.update(changed)
        columns = aligned.columns["parameter"], aligned.columns["state"]
        try:
            for i, (g, w, old) in enumerate(
                zip(aligned.gradients, *columns, strict=True)
            ):
                check_state(aligned.places[i], old, exactly=False)
                self._single = (i, aligned.path(i))
                state = dict(old)
                scaled = g if gradient_scale is None else g * gradient_scale
                new.append(self.apply_single(scaled, w, state))
                if skip is not None:
                    new[-1] = mx.where(skip, w, new[-1])
                    state = {k: mx.where(skip, old[k], x) for k, x in state.items()}
                states.append(state)
        except BaseException:
            self.state.update(before)
            raise
        finally:
            del self._single
        for old, state in zip(columns[1], states, strict=True):
            old.update(state)
        return new

    def apply_single(
        self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]
    ) -> mx.array:
        """Updates one parameter and its state.

        Args:
            gradient (array): The parameter's gradient, of its shape.
            parameter (array): The parameter.
            state (dict): Its ``"v"`` and ``"u"``, replaced by the new ones.

        Returns:
            array: The new parameter.
        """
        i, path = self._single
        check_state(None, state, exactly=False)
        step = self.step if i == 0 else self.step + mx.array(i << 32, mx.uint64)
        [new], [state["v"]], [state["u"]] = update_tensors(
            [parameter],
            [gradient],
            [state["v"]],
            [state["u"]],
            self.learning_rate,
            self,
            path=lambda _: path,
            # Each parameter draws random bits of its own.
            step=step,
            gradient_scale=None,
            skip=None,
            backend=self.backend,
        )
        return new
