"""What runs on the device: one function per operation, a jnp reference behind each.

Import the modules: `attention`, `pages`, `linear`, `sampling`; `library` loads the compiled
handlers that the first three use on CPU.
"""
