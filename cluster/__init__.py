"""Sweeps on a Ray cluster.

A sweep runs on a cluster by Ray's own job command,
`ray job submit --working-dir . -- python -m search run SWEEP.toml`; the README gives the lines.
"""
