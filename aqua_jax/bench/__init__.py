"""Workloads and latency metrics: how fast a model is on this machine."""
