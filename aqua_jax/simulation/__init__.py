"""The scheduler that serves, under a virtual clock: what another machine would do. No jax."""
