"""Tests of aqua_jax; the folders mirror the tree they test."""
