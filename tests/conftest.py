"""Tests run from anywhere, on one thread each."""

import os
import pathlib
import signal
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

# Under nohup a hangup is ignored, and in the background of a shell script an interrupt; the programs in test would
# inherit that. A handler is not inherited.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Whole scripts take longest. They come first, so that no process is left with one of them at the end.
LONGEST = """
    test_training.py test_quickstart test_train test_faults test_sharding test_published test_fid scripts/
    test_objectives test_benchmark_gpu test_sampling_speed test_detect_noise gpu/
""".split()


@pytest.fixture(scope="session", autouse=True)
def quick_runs():
    from tests.support.quick import quicken  # imports torch, which reads the environment above

    with pytest.MonkeyPatch.context() as patch:
        quicken(patch.setattr)
        yield


def pytest_collection_modifyitems(items):
    """Run the slowest files first."""
    items.sort(key=lambda item: next((i for i, name in enumerate(LONGEST) if name in str(item.path)), len(LONGEST)))
