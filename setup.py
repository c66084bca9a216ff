"""Builds the package. Everything else is in pyproject.toml."""

from setuptools import setup

setup()
