"""Memory off the device: arenas, lending them to other processes, stores of pages over them.

Nothing here imports jax: a lender starts in a tenth of a second, and planning can be tested alone.
"""
