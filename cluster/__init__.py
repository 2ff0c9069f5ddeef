"""Sweeps on a Ray cluster: as jobs, by schedules, and what a cluster is made of (`deploy`)."""
