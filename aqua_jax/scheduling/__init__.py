"""Who runs next, as pure Python: plain data and a clock in, a plain plan out. No jax."""
