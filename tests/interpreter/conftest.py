"""Tests of the Triton kernels that need the interpreter: tests/test_triton.py runs them in a process of their own."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
