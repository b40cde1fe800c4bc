"""The state of a training run, and how a checkpoint's items hold it."""

import dataclasses
from typing import Any

import jax
import optax

FORMAT = 3
"""Number of the form of checkpoints that is written. Read too: 2, which has the step for a position in the data, and 1,
which also named the buffers `router_bias`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Holds all that training changes.

    Attributes:
      step: int32 scalar, steps taken.
      params: nested dict of the model's parameters.
      opt_state: of the optimizer; None where a checkpoint holds parameters alone.
      buffers: nested dict of the layers' state that has no gradient (loss-free balancing's bias), empty where none has.
      key: random key of the run; step s draws from fold_in(key, s).
    """

    step: jax.Array
    params: dict[str, Any]
    opt_state: optax.OptState | None
    buffers: dict[str, Any]
    key: jax.Array


def initial_keys(seed: int) -> tuple[jax.Array, jax.Array]:
    """Returns the random keys of a run's initialisation, and of its training."""
    initialisation, training = jax.random.split(jax.random.key(seed))
    return initialisation, training


def items_of(state: TrainState, form: int = FORMAT) -> dict[str, Any]:
    """Returns the state as the items of a checkpoint of that form hold it: the key as plain numbers."""
    train = {"step": state.step, "key": jax.random.key_data(state.key), buffers_name(form): state.buffers}
    return {"params": state.params, "opt_state": state.opt_state, "train": train}


def state_of(items: dict[str, Any], form: int = FORMAT) -> TrainState:
    """Makes the state from a checkpoint's items, as `items_of` gives them; a missing `opt_state` is None."""
    train = items["train"]
    return TrainState(
        step=train["step"],
        params=items["params"],
        opt_state=items.get("opt_state"),
        buffers=train[buffers_name(form)],
        key=jax.random.wrap_key_data(train["key"]),
    )


def buffers_name(form: int) -> str:
    """Returns the name of the buffers in the item `train` of a checkpoint of that form."""
    return "router_bias" if form == 1 else "buffers"
