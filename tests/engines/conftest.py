"""Fixtures of several files here."""

from __future__ import annotations

import importlib.util

from rail_requests import library  # noqa: F401

if importlib.util.find_spec("deepep_train._C") is not None:
    from low_latency_stand_ins import engine, kernels  # noqa: F401
