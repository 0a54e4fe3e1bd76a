"""Where KV lives, as bookkeeping: pages and the prefixes they hold. Pure Python, no jax."""
