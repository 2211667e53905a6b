"""For tools that look for a setup.py; everything that it would say is in pyproject.toml."""

from setuptools import setup

setup()
