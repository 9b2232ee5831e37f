"""The rules of the house (CONTRIBUTING.md): who imports whom, how long files are, how errors and comments read."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

SOURCES = sorted(
    p
    for p in ROOT.rglob("*.py")
    if not any(part.startswith(".") for part in p.relative_to(ROOT).parts) and p.relative_to(ROOT).parts[0] != "tests"
)
SCRIPTS = [p for p in SOURCES if p.parent == ROOT]
# Lower layers first: a file imports from its own package or from one below.
LAYERS = [
    "dnnlib",
    "torch_utils",
    "archives",
    "training",
    "sampling",
    "detection metrics",
    "reports",
    "recipes",
    "",  # scripts, benchmarks, examples
]


def name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer(module):
    package = module.split(".")[0]
    return next((i for i, packages in enumerate(LAYERS) if package in packages.split()), len(LAYERS) - 1)


def imports(path):
    """Yield (module, whether at the top of the file) of every import."""
    tree = ast.parse(path.read_text())
    typing = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    top = {id(node) for body in (tree, *typing) for node in body.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{node.module}.{alias.name}", id(node) in top) for alias in node.names)


OURS = {name(p) for p in SOURCES} | {p.name for p in ROOT.iterdir() if p.is_dir()}
OPTIONAL = {
    "cleanlab",
    "lmdb",
    "onnx",
    "open_clip",
    "pyarrow",
    "pyspng",
    "torch.utils.tensorboard",
    "torch_fidelity",
    "torchvision",
    "wandb",
}
SLOW = {"sklearn", "torch"}  # a second each: dataset_tool.py starts without them
BRITISH = re.compile(
    r"\b\w*(?:colour|neighbour|behaviour|favour|labell|modell|cancell|travell|centred?\b|artefact|normalis|optimis|"
    r"initialis|maximis|minimis|sanitis|regularis|synchronis|serialis|summaris|penalis|generalis|recognis|organis|"
    r"realis|finalis|visualis|standardis|grey)\w*",
    re.IGNORECASE,
)
KEPT = {"realised_rate"}  # a key of dataset.json
FLAG = re.compile(r"(?<![\w.-])--[a-zA-Z][\w-]*")


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_point_downwards(path):
    for module, at_top in imports(path):
        if module.split(".")[0] in {o.split(".")[0] for o in OURS}:
            assert at_top, f"{module} is imported inside a function or block"
            assert layer(module) <= layer(name(path)), f"{name(path)} imports {module}, which stands above it"
        elif not at_top:
            fine = OPTIONAL | (SLOW if name(path) in ("torch_utils.safe_pickle", "archives.layouts.builtin") else set())
            assert any(module.startswith(o) for o in fine), f"{module} is imported in a function"


def test_archives_wait_for_no_slow_import():
    code = "import sys, dataset_tool; print(sorted({'sklearn', 'scipy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_networks_stand_alone():
    ours = {o.split(".")[0] for o in OURS}
    found = {module for module, _ in imports(ROOT / "training" / "networks.py") if module.split(".")[0] in ours}
    assert found == {"torch_utils.persistence.persistent_class"}


def test_no_package_is_a_crowd():
    lines = {}
    for path in SOURCES:
        package = path.relative_to(ROOT).parts[0] if path.parent != ROOT else "scripts"
        lines[package] = lines.get(package, 0) + len(path.read_text().splitlines())
    assert max(lines.values()) < 0.3 * sum(lines.values()), lines


TESTS = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", [*SOURCES, *TESTS], ids=name)
def test_files_are_short_and_finished(path):
    text = path.read_text()
    limit = 150 if path in SCRIPTS else 500
    if name(path) != "training.networks":
        assert len(text.splitlines()) <= limit
    if path != pathlib.Path(__file__).resolve():
        assert not re.search(r"\bTODO\b|\bFIXME\b|\bXXX\b", text)
        british = {match[0] for match in BRITISH.finditer(text)} - KEPT
        assert not british, british
    if path in SOURCES:
        assert ast.get_docstring(ast.parse(text)), "no docstring"
        assert not re.search(r"allow_pickle\s*=\s*True|\.cuda\(\)|device=torch\.device\(.cuda.\)", text)


PAGES = [p for pattern in ("*.md", "docs/**/*.md") for p in sorted(ROOT.glob(pattern))]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_lines_of_pages_are_short(path):
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        assert len(line) <= 120 or line.startswith(("|", "    ")), f"line {number} has {len(line)} characters"


@pytest.mark.parametrize("path", TESTS, ids=name)
def test_no_test_imports_a_test(path):
    assert not [module for module, _ in imports(path) if re.search(r"(^|\.)test_", module)]


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_what_is_public_is_documented(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_") and node.name != "main":
            assert ast.get_docstring(node), f"{node.name} has no docstring"


# Modules that speak of options: the tables, their parser, the launch of a run, the choice of the device.
SPEAKS_OF_OPTIONS = re.compile(
    r".*[._]options|dnnlib\.cli|training\.(run|presets)|torch_utils\.distributed|(recipes|benchmarks|examples)\..*"
)


@pytest.mark.parametrize("path", [p for p in SOURCES if p not in SCRIPTS], ids=name)
def test_library_errors_name_no_options(path):
    """Library code names quantities and files; a script adds the option. A whole command may stand in a hint."""
    if SPEAKS_OF_OPTIONS.fullmatch(name(path)):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and node.exc is not None:
            texts = [part.value for part in ast.walk(node.exc) if isinstance(part, ast.Constant)]
            text = " ".join(part for part in texts if isinstance(part, str))
            assert not FLAG.search(text) or ".py" in text or "same command" in text, text


def test_every_script_shows_an_example_that_names_itself():
    for path in SCRIPTS:
        assert f"python {path.name}" in path.read_text(), path.name
