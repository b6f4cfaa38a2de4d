"""Benchmarks over the cases that tests/specs/ declares: ``python -m benchmarks.run --help``."""
