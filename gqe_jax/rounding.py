"""Whole numbers rounded up; jax.Array too, element by element."""


def ceil_div(size, divisor):
    """Returns the least whole number that is not below `size` / `divisor`."""
    return -(-size // divisor)


def round_up(size: int, multiple: int) -> int:
    """Returns the least multiple that is not below `size`."""
    return ceil_div(size, multiple) * multiple
