"""make, with a Python that only notes what it should install."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

PYTHON = f"""#!/bin/sh
case "$*" in
  *version_info*) exec {sys.executable} -c "${{2%%; *}}; sys.version_info = ($VERSION); ${{2#*; }}";;
  *urlopen*) exit $OFFLINE;;
  "-m venv .venv") mkdir -p .venv/bin; cp bin/pip .venv/bin;;
esac
"""


@pytest.fixture
def make(tmp_path):
    if not shutil.which("make"):
        pytest.skip("needs make")
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "requirements-cpu.lock"):
        shutil.copy(ROOT / name, tmp_path)
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "mkdir", "cp", "touch"):  # a PATH without nvidia-smi
        (tools / name).symlink_to(shutil.which(name))

    def run(version=(3, 11), offline=0, system="Linux", gpu=False):
        texts = dict(python=PYTHON, uname=f"#!/bin/sh\necho {system}\n", pip='#!/bin/sh\necho "$@" >>pip.log\n')
        if gpu:
            texts["nvidia-smi"] = "#!/bin/sh\n"
        for name, text in texts.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        known = dict(PATH=str(tools), VERSION=", ".join(map(str, version)), OFFLINE=str(offline), cpu="junk")
        command = [shutil.which("make"), "PYTHON=python", ".venv/.installed"]
        done = subprocess.run(command, cwd=tmp_path, env=known, capture_output=True, text=True)
        log = tmp_path / "pip.log"
        return done, log.read_text() if log.exists() else None

    return run


INDEX = "--extra-index-url=https://download.pytorch.org/whl/cpu "


@pytest.mark.parametrize(
    "how, installed",
    [
        ({}, f"{INDEX}-r requirements-cpu.lock"),
        (dict(offline=1), "-r requirements-cpu.lock"),
        (dict(system="Darwin"), "-r requirements-cpu.lock"),
        (dict(gpu=True), "-r requirements-dev.txt"),
    ],
    ids=["Linux", "offline", "Mac", "GPU"],
)
def test_the_cpu_build_is_taken_where_its_index_answers(make, how, installed):
    done, log = make(**how)
    assert done.returncode == 0 and log == f"install --quiet {installed}\n", done.stderr


def test_an_old_python_is_named_in_one_line(make, tmp_path):
    done, log = make(version=(3, 9))
    assert done.returncode and log is None and not os.path.exists(tmp_path / ".venv")
    assert done.stderr.splitlines()[0] == "Python 3.10 or newer is needed; name one: make PYTHON=python3.12"
