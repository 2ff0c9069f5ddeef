"""`python -m search`, on a Ray whose workers begin with a hook: `driver.py HOOK run SWEEP ...`."""

from __future__ import annotations

import sys

import ray

from search.__main__ import main

if __name__ == "__main__":
    hook, *arguments = sys.argv[1:]
    environment = {"worker_process_setup_hook": f"tests.chaos.hooks.{hook}"}
    ray.init(runtime_env=environment, log_to_driver=False, logging_level="ERROR")
    sys.exit(main(arguments))
