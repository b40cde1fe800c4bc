"""Measuring: attention beside its rivals, and the data's way to the device."""

TARGETS = ("v5e", "v5p", "v6e", "tpu7x")
"""Generations of TPUs that are compared for without one."""
