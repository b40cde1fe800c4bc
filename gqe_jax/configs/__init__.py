"""Configurations that come with gqe_jax: `gqe train --config NAME[:ARG]`."""
