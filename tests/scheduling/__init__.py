"""Tests of aqua_jax.scheduling."""
