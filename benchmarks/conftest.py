"""Options of `python -m pytest benchmarks`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-size", action="store_true", help="time the reported shapes, not the smoke ones")
