"""Signals that ask a program to end, and a terminal that closes."""

import os
import pty
import signal
import time

import pytest

from dnnlib.signals import ENDING, catching, exit_in_order, leave_terminal


def test_handlers_are_put_back_and_an_ignored_hangup_stays_ignored():
    """nohup ignores SIGHUP: whoever uses it wants the program to go on."""
    seen = []
    before = [signal.getsignal(number) for number in ENDING]
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catching(lambda number, _frame: seen.append(number), *ENDING):
            for number in ENDING:
                os.kill(os.getpid(), number)
    finally:
        signal.signal(signal.SIGHUP, ignored)
    assert seen == [signal.SIGTERM]
    assert [signal.getsignal(number) for number in ENDING] == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_the_exit_code_is_that_of_shells(number, code):
    with pytest.raises(SystemExit) as found, catching(exit_in_order, *ENDING):
        os.kill(os.getpid(), number)
        time.sleep(1)
    assert found.value.code == code


def test_after_a_hangup_prints_go_nowhere():
    """Writing to a terminal that has gone fails, and the work must not."""
    pid, terminal = pty.fork()
    if not pid:
        try:
            caught = []

            def handler(number, _frame):
                leave_terminal(number)
                caught.append(number)

            with catching(handler, *ENDING):
                os.write(1, b"ready")
                while not caught:
                    time.sleep(0.01)
                os.write(1, b"saved")
                os.write(2, b"saved")
            os._exit(7)
        finally:
            os._exit(99)
    assert os.read(terminal, 5) == b"ready"
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
