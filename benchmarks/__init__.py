"""Benchmarks against plain and compiled PyTorch: `python -m benchmarks ops`, run from the checkout."""
