"""Fixtures of several files here."""

from __future__ import annotations

import importlib.util

if importlib.util.find_spec("deepep_train._C") is not None:
    from low_latency_stand_ins import engine, kernels  # noqa: F401
    from rail_requests import library  # noqa: F401
