"""Test what the pages and comments say about the repository: pages, sections, links, files, commands and options."""

import importlib
import importlib.util
import re
import shlex

import click
import pytest

from tests.support.paths import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
GUIDES = [page for page in PAGES if page.name != "CHANGELOG.md"]  # The change log names files that are gone.
CODE = [
    path
    for path in sorted(ROOT.rglob("*.py"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]
MODULES = (
    "benchmarks",
    "benchmarks.denoising_error",
    "benchmarks.gpu",
    "benchmarks.operators",
    "benchmarks.outlier_costs",
    "benchmarks.outlier_trainings",
    "benchmarks.precision",
    "benchmarks.scaling",
    "examples.toy2d",
)
# Options of programs that are not ours.
FOREIGN = {"--standalone", "--nproc-per-node", "--nproc_per_node", "--nnodes", "--max-restarts"}


def name(path):
    return str(path.relative_to(ROOT))


def main_of(module):
    return importlib.import_module(f"{module}.__main__" if module == "benchmarks" else module).main


def commands():
    """Return the click command of every script by its file name, and of every module by its name."""
    scripts = sorted(path.stem for path in ROOT.glob("*.py") if "import click" in path.read_text())
    return {f"{stem}.py": main_of(stem) for stem in scripts} | {module: main_of(module) for module in MODULES}


COMMANDS = commands()
SINGLE = [
    leaf
    for command in COMMANDS.values()
    for leaf in (command.commands.values() if isinstance(command, click.Group) else [command])
]


# Pages, sections and links


def code_blocks(page):
    """Return the lines of a page that are code: indented by four spaces after a blank line, or fenced."""
    lines, fenced, indented, last = [], False, False, ""
    for line in page.read_text().splitlines():
        if line.strip():
            indented = line.startswith("    ") and (indented or not last)
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or indented:
            lines.append(line.strip())
        last = line.strip()
    return lines


def headings(page):
    return [match[1] for line in page.read_text().splitlines() if (match := re.match(r"#+ (.+)", line))]


def anchors(page):
    """Return the anchors that GitHub gives the headings of a page."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings(page)}


@pytest.mark.parametrize("path", [*PAGES, *CODE, ROOT / "Makefile"], ids=name)
def test_cited_pages_and_sections_exist(path):
    text = re.sub(r"\n\s*#? ?", " ", path.read_text()) if path.suffix == ".py" else path.read_text()
    for cited, section in re.findall(r"(?<![\w/.])(docs/[\w/.-]+\.\w+)(?:, (section \d+|[A-Z][\w' -]+))?", text):
        assert (ROOT / cited).exists(), cited
        if section and path.suffix == ".py":
            found = [re.sub(r"^(\d+)\. .*", r"section \1", heading) for heading in headings(ROOT / cited)]
            assert any(section.startswith(heading) for heading in found), f"{cited} has no section {section!r}"
    if path.suffix == ".py":  # In code a page has its whole path.
        known = {page.name for page in (ROOT / "docs").rglob("*.md")}
        bare = set(re.findall(r"(?<![\w/.-])([\w-]+\.md)\b", text))
        assert not bare & known, "cite docs/..."


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            file, _, anchor = target.partition("#")
            linked = (page.parent / file).resolve() if file else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_files_and_make_targets_exist(page):
    known = {path.name for path in CODE}
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        for path in re.findall(r"(?<![\w/.<*-])[\w/]+\.py\b", code):
            if "NAME" not in path:
                assert (ROOT / path).exists() if "/" in path else path in known, path
        if re.fullmatch(r"[\w/]+/", code) and not code.startswith(("images", "my_images")):
            assert (ROOT / code).is_dir(), code
        if match := re.match(r"make ([\w-]+)", code):
            assert match[1] in targets, code
    for line in code_blocks(page):
        if match := re.match(r"make ([\w-]+)", line):
            assert match[1] in targets, line


def test_contributing_names_what_exists():
    words = set(re.findall(r"\w+", "\n".join(path.read_text() for path in CODE)))
    for code in re.findall(r"`([^`\n]+)`", (ROOT / "CONTRIBUTING.md").read_text()):
        if re.fullmatch(r"\w+(\.\w+)*", code) and not code.endswith(".py"):
            assert words.issuperset(code.split(".")), code


def test_the_change_log_names_modules_that_exist():
    rows = re.findall(r"^\| `([\w.]+)` \| (.+) \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert len(rows) > 10
    for old, new in rows:
        modules = re.findall(r"`([\w.]+)`", new)
        for module in modules:
            assert importlib.util.find_spec(module), f"{old} -> {module}"
        assert old in modules or not (ROOT / f"{old.replace('.', '/')}.py").exists(), f"{old} still exists"


# Commands


def quoted(lines):
    """Yield (command or module, arguments) of each command line that calls one of ours."""
    text = re.sub(r"\\\n\s*", "", "\n".join(lines))
    for line in text.splitlines():
        if re.match(r"(python|torchrun) ", line):
            words = shlex.split(line, comments=True)
            found = next((i for i, word in enumerate(words) if word.endswith(".py") or word in MODULES), None)
            assert found is not None, f"unknown command: {line}"
            yield words[found], words[found + 1 :]


@pytest.mark.parametrize("page", GUIDES, ids=name)
def test_commands_of_pages_are_accepted(page):
    for script, args in quoted(code_blocks(page)):
        parse(script, args)


@pytest.mark.parametrize("script", COMMANDS)
def test_commands_of_help_texts_are_accepted(script):
    command = COMMANDS[script]
    for text in [command.help, command.epilog, *(leaf.epilog for leaf in getattr(command, "commands", {}).values())]:
        for called, args in quoted(line.strip() for line in (text or "").splitlines()):
            parse(called, args)


def parse(script, args):
    """Let click check the arguments: names, types, choices, required options."""
    assert script in COMMANDS, f"there is no {script}"
    command = COMMANDS[script]
    if isinstance(command, click.Group):
        command, args = command.commands[args[0]], args[1:]
    try:
        command.make_context(script, [arg for arg in args if arg != "..."])
    except click.ClickException as e:
        pytest.fail(f"{script} {' '.join(args)}: {e.format_message()}")


def options_named(word):
    """Return the options of all commands that accept the spelling `word`."""
    spelled = word.replace("_", "-")
    return [
        param
        for leaf in SINGLE
        for param in leaf.params
        if spelled in [opt.replace("_", "-") for opt in (*param.opts, *param.secondary_opts)]
    ]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_in_sentences_exist(page):
    for code in re.findall(r"`([^`\n]+)`", page.read_text()):
        for option, value in re.findall(r"(?<![\w-])(--[A-Za-z][\w-]*)(?:=([\w|.-]+))?", code):
            if option not in FOREIGN and "pytest" not in code and "ruff" not in code:
                params = options_named(option)
                assert params or option == "--help", f"no script has {option}"
                choices = [set(p.type.choices) if isinstance(p.type, click.Choice) else None for p in params]
                if value and choices and None not in choices and not value.isupper():
                    assert set(value.split("|")) <= set().union(*choices), f"{option}={value}"
