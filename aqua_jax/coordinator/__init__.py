"""Who lends memory to whom on this machine: the ledger, and the server around it (no jax).

The ledger is a pure state machine, checked against a model. The server gives it connections,
processes that exit, and descriptors.
"""
