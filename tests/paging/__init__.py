"""Tests of aqua_jax.paging."""
