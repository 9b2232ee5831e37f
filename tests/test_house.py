"""The house rules of docs and architecture: who imports whom, how long files are, nothing left undone."""

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
    """(module, inside a function?) of every import."""
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
    "open_clip",
    "pyspng",
    "torch.utils.tensorboard",
    "torch_fidelity",
    "torchvision",
    "wandb",
}
SLOW = {"sklearn", "torch"}  # what the modules that dataset_tool.py needs import where they use it: a second each


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_imports_point_downwards(path):
    for module, at_top in imports(path):
        if module.split(".")[0] in {o.split(".")[0] for o in OURS}:
            assert at_top, f"{module} is imported inside a function or block"
            assert layer(module) <= layer(name(path)), f"{name(path)} imports {module}, which stands above it"
        elif not at_top:
            fine = OPTIONAL | (SLOW if name(path) in ("torch_utils.safe_pickle", "archives.sources") else set())
            assert any(module.startswith(o) for o in fine), f"{module} is imported in a function"


def test_archives_wait_for_no_slow_import():
    code = "import sys, dataset_tool; print(sorted({'sklearn', 'scipy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_networks_stand_alone():
    ours = {o.split(".")[0] for o in OURS}
    found = {module for module, _ in imports(ROOT / "training" / "networks.py") if module.split(".")[0] in ours}
    assert found == {"torch_utils.persistence.persistent_class"}


@pytest.mark.parametrize("path", [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))], ids=name)
def test_files_are_short_and_finished(path):
    text = path.read_text()
    limit = 150 if path in SCRIPTS else 500
    if name(path) != "training.networks":
        assert len(text.splitlines()) <= limit
    if path != pathlib.Path(__file__).resolve():
        assert not re.search(r"NotImplementedError|\bTODO\b|\bFIXME\b|\bXXX\b", text)
    if path in SOURCES:
        assert ast.get_docstring(ast.parse(text)), "no docstring"
        assert not re.search(r"allow_pickle\s*=\s*True|\.cuda\(\)|device=torch\.device\(.cuda.\)", text)


def test_every_script_shows_an_example_that_names_itself():
    for path in SCRIPTS:
        assert f"python {path.name}" in path.read_text(), path.name
