"""Measurements: ``python -m braze.benchmarks``."""
