"""The absl commands: `aqua-jax COMMAND --flags`. The only place that knows flags."""
