"""`python -m gqe_jax.cli` is the command `gqe`."""

from gqe_jax.cli.main import command

command()
