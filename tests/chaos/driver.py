"""`python -m search`, on a Ray whose workers begin with a hook: `driver.py HOOK run SWEEP ...`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ray

from search.__main__ import main

if __name__ == "__main__":
    hook, *arguments = sys.argv[1:]
    passed = {"PYTHONPATH": str(Path(__file__).parents[2])}
    passed |= {name: os.environ[name] for name in ("GPU_NOTES", "MEET") if name in os.environ}
    environment = {"worker_process_setup_hook": f"tests.chaos.hooks.{hook}", "env_vars": passed}
    ray.init(runtime_env=environment, log_to_driver=False, logging_level="ERROR")
    sys.exit(main(arguments))
