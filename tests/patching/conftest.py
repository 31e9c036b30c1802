"""Tiny modules: a second thread only adds waiting."""

import pytest


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)
