"""The configuration of one trial."""

from __future__ import annotations

CONFIG = {
    "trial": "0007",
    "plan": '{"steps": []}',
    "origin": "search",
    "epochs": 3,
    "seed": 0,
    "learned": "",
    "cost_ratio": 0.5,
    "parameters": {"budget": 0.5},
}
