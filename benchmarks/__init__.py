"""Measurements with committed records; see benchmarks/README.md."""
