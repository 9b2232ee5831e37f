"""Tests run from anywhere, on one thread each."""

import os
import pathlib
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
