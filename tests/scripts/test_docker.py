"""The Dockerfiles and the locks that they install: what they name is there, and nothing is missing."""

import ast
import fnmatch
import importlib.metadata
import re
import subprocess

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.paths import ROOT

FILES = ["Dockerfile", "Dockerfile.cuda"]
LOCKS = {"Dockerfile": "requirements-cpu.lock", "Dockerfile.cuda": "requirements-cuda.lock"}
INSTRUCTIONS = {"FROM", "RUN", "COPY", "ARG", "USER", "VOLUME", "WORKDIR", "ENTRYPOINT", "CMD"}


def instructions(name):
    """Return (instruction, its arguments) of each line of a Dockerfile."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE))
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def copied(name):
    """Return the sources of all COPY instructions."""
    return [source for what, args in instructions(name) if what == "COPY" for source in args.split()[:-1]]


def tracked():
    """Return the files that git knows or will know; everything where there is no git."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        listed = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    return [path for path in listed if path]


def requirements(name):
    """Return the requirements of a file, by canonical name."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def pins(name):
    found = requirements(name)
    assert all(re.fullmatch(r"==[\w.]+", str(requirement.specifier)) for requirement in found.values())
    return {package: str(requirement.specifier)[2:] for package, requirement in found.items()}


@pytest.mark.parametrize("name", FILES)
def test_instructions(name):
    found = instructions(name)
    assert {what for what, _ in found} <= INSTRUCTIONS
    kinds = [what for what, _ in found]
    assert kinds[0] == "FROM" and kinds.count("FROM") == 1
    version = re.fullmatch(r"python:(\d+\.\d+)-slim", dict(found)["FROM"])[1]
    assert f"Python {version}" in (ROOT / LOCKS[name]).read_text().split("==")[0]
    assert kinds.index("USER") > max(i for i, kind in enumerate(kinds) if kind in ("RUN", "COPY"))  # root until then
    command = ast.literal_eval(dict(found)["CMD"])
    assert dict(found)["ENTRYPOINT"] == '["python"]' and (ROOT / command[0]).is_file()


@pytest.mark.parametrize("name", FILES)
def test_every_path_is_there(name):
    files = tracked()
    ignored = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    for source in copied(name):
        matches = [path for path in files if fnmatch.fnmatch(path, source) or path.startswith(f"{source}/")]
        assert matches, source
        assert not [rule for rule in ignored if fnmatch.fnmatch(source, rule)], source
    text = " ".join(args for what, args in instructions(name) if what == "RUN")
    for file in re.findall(r"--(?:requirement|constraint)=(\S+)", text):
        assert file in copied(name) and (ROOT / file).is_file()
    assert LOCKS[name] in text


@pytest.mark.parametrize("name", FILES)
def test_every_package_of_ours_is_copied(name):
    scripts = [path for path in tracked() if re.fullmatch(r"\w+\.py", path)]
    assert scripts and "*.py" in copied(name)
    packages = {path.split("/")[0] for path in tracked() if path.endswith("/__init__.py")} - {"tests"}
    assert packages == {source for source in copied(name) if (ROOT / source).is_dir()}


@pytest.mark.parametrize("lock", LOCKS.values())
def test_locks_hold_what_the_scripts_need(lock):
    versions = pins(lock)
    for package, requirement in requirements("requirements.txt").items():
        assert versions[package] in requirement.specifier, package
        assert importlib.metadata.version(package)
    shared = pins("requirements-cpu.lock")
    assert not {p for p in versions.keys() & shared.keys() if versions[p] != shared[p]}


def test_the_locks_are_closed():
    """What a locked package needs is locked, too, as far as this environment has the package."""
    versions = pins("requirements-cpu.lock")
    for package in versions:
        try:
            needed = importlib.metadata.requires(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if importlib.metadata.version(package).split("+")[0] != versions[package]:
            continue
        for requirement in map(Requirement, needed):
            if requirement.marker is None or requirement.marker.evaluate(dict(extra="")):
                other = canonicalize_name(requirement.name)
                assert other in versions or other in ("setuptools", "pip"), f"{package} needs {requirement}"
