"""Which plan is tried next, and which trials are stopped early."""
