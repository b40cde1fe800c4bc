"""Measuring: attention beside its rivals, and the data's way to the device."""
