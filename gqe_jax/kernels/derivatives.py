"""Refuses derivatives that an implementation does not have, and says what to use instead."""

import functools
from typing import Any

import jax

ONCE = (
    "attend differentiates once and in reverse mode: implementation='reference' has second derivatives and forward "
    "mode (jax.jvp, jax.jacfwd, jax.hessian), at the cost of [S, T] arrays"
)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def refuse_derivatives(tree: Any, message: str) -> Any:
    """Returns the same arrays, and raises NotImplementedError with the message only when they are differentiated."""
    del message
    return tree


@refuse_derivatives.defjvp
def _refuse(message, primals, tangents):
    raise NotImplementedError(message)
