"""README.md and the pages in docs/: their examples run, their links lead somewhere, and the names in them exist.

The examples of a page run one after the other, in one namespace. One that needs a package says so where it begins:

    ```python needs torch
"""

import importlib
import inspect
import re
from pathlib import Path

import pytest

import fake_cupy
import fastce
from device import device, has_gpu

CLONE = Path(__file__).parent.parent
README = CLONE / "README.md"
if not README.exists():
    pytest.skip("an installed package has no pages", allow_module_level=True)

PAGES = [README, *sorted((CLONE / "docs").glob("*.md"))]
MOST_LINES = 200  # of the README
WIDTH = 120  # of lines, but for tables and pictures, which cannot be broken

EXAMPLE = re.compile(r"^```(python\b.*)\n((?:.*\n)*?)```$", re.MULTILINE)
BLOCK = re.compile(r"^```.*\n(?:.*\n)*?```$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")


def text_of(page):
    return page.read_text(encoding="utf-8")


def prose_of(page):
    """Return a page without its blocks of code."""
    return BLOCK.sub("", text_of(page))


def table_of(page, heading):
    """Return the first table below a heading, as rows of cells."""
    lines = text_of(page).partition(f"\n## {heading}\n")[2].splitlines()
    rows = [line.strip("|").split("|") for line in lines]
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next((i for i, line in enumerate(lines) if i > start and not line.startswith("|")), len(lines))
    return [[cell.strip() for cell in row] for row in rows[start + 2 : end]]


def pages(*others):
    return pytest.mark.parametrize("page", [*PAGES, *others], ids=lambda page: page.name)


def is_installed(name):
    if name == "cupy":
        return has_gpu()
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True


def run_examples(page, given=()):
    """Run what can be run; return which packages are missing for the rest, unless a stand-in for them is given."""
    namespace, missing = {}, set()
    for example in EXAMPLE.finditer(text_of(page)):
        _, _, package = example[1].partition(" needs ")
        assert example[1] in ("python", f"python needs {package}")
        if package and package not in given and not is_installed(package):
            missing.add(package)
            continue
        line = text_of(page)[: example.start()].count("\n") + 1
        exec(compile("\n" * line + example[2], page, "exec"), namespace)
    return missing


@pages()
def test_examples_run(page):
    if missing := run_examples(page):
        pytest.skip(f"needs {', '.join(sorted(missing))}")


@pytest.mark.slow
@pytest.mark.skipif(not fake_cupy.compiler(), reason="no C++ compiler")
def test_examples_for_a_gpu_run_on_its_stand_in():
    with device("host"):
        assert not run_examples(CLONE / "docs" / "gpu.md", given={"cupy"})


def test_pages_mark_only_what_they_need():
    """The README's examples, and those of most pages, need nothing else."""
    marked = {page.stem for page in PAGES if "python needs " in text_of(page)}
    assert marked == {"boosting", "gpu", "scikit-learn", "torch"}


def anchors_of(page):
    """Return the anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pages()
def test_links_lead_somewhere(page):
    links = LINK.findall(prose_of(page))
    assert links
    for link in links:
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file() and target.is_relative_to(CLONE), link
        assert not anchor or anchor in anchors_of(target), link


def test_every_page_is_listed_in_the_index_and_reached_from_the_readme():
    names = {page.name for page in PAGES[1:]} - {"index.md"}
    assert {link.partition("#")[0] for link in LINK.findall(text_of(CLONE / "docs" / "index.md"))} >= names
    reached = {Path(link.partition("#")[0]).name for link in LINK.findall(text_of(README))}
    assert reached >= names


@pages()
def test_names_exist(page):
    """Functions, files and command-line options that pages name."""
    patterns = ("fastce/__main__.py", "asv_bench/*.py", "tests/fuzz*.py", ".ci/*")
    sources = "".join(text_of(path) for pattern in patterns for path in CLONE.glob(pattern))
    for code in CODE.findall(prose_of(page)):
        if match := re.match(r"fastce((?:\.\w+)+)", code):
            find(match[1].split(".")[1:])
        for path in re.findall(r"(?<!\S)(?:asv_bench|tests|fastce|docs|\.ci)/[\w./]*", code):
            assert (CLONE / path).exists(), code
        if page.name == "architecture.md" and re.fullmatch(r"[\w*./]+(\.\w+|/)", code) and not (CLONE / code).exists():
            assert list((CLONE / "fastce").glob(code)), code
        if not code.startswith("pip "):
            for option in set(re.findall(r"(?<!\S)--[a-z-]+", code)) - {"--help"}:
                assert re.search(rf"{option}\b", sources), code


def find(names):
    """Look a public name up, in a module that may need another package."""
    thing = fastce
    for name in names:
        assert not name.startswith("_")
        if not hasattr(thing, name):
            try:
                importlib.import_module(f"fastce.{name}")
            except ModuleNotFoundError as error:
                assert error.name in ("sklearn", "torch")  # noqa: PT017 - where it is missing, not what is raised
                return
        thing = getattr(thing, name)


def test_the_readme_is_short():
    assert len(text_of(README).splitlines()) <= MOST_LINES


@pages()
def test_pages_are_plain_markdown(page):
    text = prose_of(page)
    assert not re.search(r"<[a-zA-Z!/]", CODE.sub("", text)), "HTML"
    for line in text_of(page).splitlines():
        assert len(line) <= WIDTH or line.startswith(("|", "![")), line


@pytest.mark.parametrize("name", sorted({*fastce.__all__} - {"CrossEntropyStats"}))
def test_help_shows_annotations_by_their_names(name):
    """ArrayLike, and not the union that it stands for."""
    thing = getattr(fastce, name)
    methods = [method for _, method in inspect.getmembers(thing, inspect.isfunction)] if inspect.isclass(thing) else []
    for function in (thing, *methods):
        assert not re.search(r"\bnumpy\.|\btyping\.|Union", str(inspect.signature(function)))


def test_the_readme_names_every_function_and_its_parameters():
    cells = [code for row in table_of(README, "Functions") for code in CODE.findall(row[0])]
    calls = dict(re.match(r"(\w+)(?:\((.*)\))?$", code).groups() for code in cells)
    assert set(calls) == {*fastce.__all__} - {"CrossEntropyStats", "show_config"}
    for name, parameters in calls.items():
        known = inspect.signature(getattr(fastce, name)).parameters
        for parameter in re.findall(r"\w+", parameters or ""):
            assert parameter in known or parameter == "options", name


@pytest.mark.parametrize("page", [README, CLONE / "docs" / "options.md"], ids=["README", "options"])
def test_tables_of_options_are_complete(page):
    heading = "Options"
    if page != README:
        lines = text_of(page).splitlines()
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    else:
        rows = table_of(page, heading)
    described = {row[0].strip("`"): row[1].strip("`") for row in rows}
    parameters = inspect.signature(fastce.cross_entropy).parameters.values()
    options = {p.name: str(p.default) for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert {name: default.strip('"') for name, default in described.items()} == options
