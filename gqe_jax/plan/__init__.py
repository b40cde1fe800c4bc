"""Planning: whether a configuration fits a slice of TPUs, and how fast it could be, without a TPU."""

from typing import Literal, get_args

Mode = Literal["train", "prefill", "decode"]
"""Which step is planned."""
MODES: tuple[Mode, ...] = get_args(Mode)
