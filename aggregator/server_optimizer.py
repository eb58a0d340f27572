"""From the clients' combined change to the next parameters: the aggregator's own optimizer.

Rules: the combined change stands for a negative gradient. An optimizer keeps at most two moments of a
stage's parameters, as float32, so what is saved and loaded goes on bit for bit; a new stage starts anew. A
parameter that no client trained stays, and so do its moments.

`momentum` is FedAvgM (Hsu et al., arXiv 1909.06335); `adagrad`, `adam` and `yogi` are Algorithm 2 of Reddi
et al., arXiv 2003.00295, with m = 0 and v = tau^2 at first, and no correction of their bias.
Next: `aggregator/run.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from aggregator.plan import RunPlan
from wire.compression import Shapes
from wire.errors import LocalError
from wire.tensors import Array, Arrays

Wide = npt.NDArray[np.float64]

_SECOND_MOMENTS: dict[str, Callable[[Wide, Wide, float], Wide]] = {
    "adagrad": lambda v, square, _beta: v + square,
    "adam": lambda v, square, beta: beta * v + (1 - beta) * square,
    "yogi": lambda v, square, beta: v - (1 - beta) * square * np.sign(v - square),
}
"""(v, the change squared, beta 2) -> the next v."""

OPTIMIZERS = ("none", "momentum", *_SECOND_MOMENTS)
"""What `RunPlan.server_optimizer` may be."""

_FIRST, _SECOND = "m.", "v."  # before a parameter's name


class ServerOptimizer:
    """Of one stage. shapes: torch name -> shape, of all that the stage trains."""

    def __init__(self, plan: RunPlan, shapes: Shapes) -> None:
        self._plan = plan
        self._state: Arrays = {}
        if plan.server_optimizer != "none":
            self._state |= {_FIRST + name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        if plan.server_optimizer in _SECOND_MOMENTS:
            start = plan.server_tau**2
            self._state |= {
                _SECOND + name: np.full(shape, start, np.float32) for name, shape in shapes.items()
            }

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of `state`."""
        return {name: value.shape for name, value in self._state.items()}

    def step(self, parameters: Mapping[str, Array], delta: Mapping[str, Array]) -> Arrays:
        """The next parameters: float32, the names and order of `parameters`.

        delta: what `combine` gave; a name that is not in it was trained by nobody. What is beyond float32
        becomes infinite, also in the moments.
        """
        rate = self._plan.effective_server_learning_rate
        with np.errstate(over="ignore"):
            return {
                name: _float32(value + rate * self._direction(name, delta[name].astype(np.float64)))
                if name in delta
                else value.copy()
                for name, value in parameters.items()
            }

    def state(self) -> Arrays:
        """Copies of the moments, by names of their own; none for `none`."""
        return {name: value.copy() for name, value in self._state.items()}

    def load(self, state: Mapping[str, Array]) -> None:
        """Go on from a `state` of the same settings and stage. Raises `LocalError` for another."""
        if {name: value.shape for name, value in state.items()} != self.shapes:
            raise LocalError("these are not the moments of this stage's server optimizer")
        self._state = {name: np.array(state[name], np.float32) for name in self._state}

    def _direction(self, name: str, change: Wide) -> Wide:
        """Of the step in one parameter; takes `change` into its moments."""
        plan = self._plan
        if plan.server_optimizer == "none":
            return change
        first, beta = self._state[_FIRST + name].astype(np.float64), plan.server_momentum
        if plan.server_optimizer == "momentum":
            m = beta * first + change
            self._state[_FIRST + name] = _float32(m)
            return m
        m = beta * first + (1 - beta) * change
        next_v = _SECOND_MOMENTS[plan.server_optimizer]
        v = next_v(self._state[_SECOND + name].astype(np.float64), np.square(change), plan.server_beta_2)
        self._state |= {_FIRST + name: _float32(m), _SECOND + name: _float32(v)}
        return np.asarray(m / (np.sqrt(v) + plan.server_tau))


def _float32(values: Wide) -> Array:
    return np.asarray(values, np.float32)
