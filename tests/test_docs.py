"""All code in the README, the docs and the docstrings runs, and what it shows is real.

A page is a program: its ```python blocks run from top to bottom in one namespace. A ```text
(or ```mermaid) block shows what the ```python block before it printed, and the error that
it raised, as Python shows it. How a text is wrapped into lines counts for an error of the
library only, which wraps it itself. A block that prints or raises is followed by its
```text block, and no ```text block stands alone.

The examples of a docstring are programs of their own.
"""

import ast
import contextlib
import io
import re
import sys
import tomllib
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

import refx_eqx as rx


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted((ROOT / "refx_eqx").rglob("*.py"))

WRITTEN = [
    *PAGES,
    *SOURCES,
    *sorted((ROOT / "examples").glob("*.py")),
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "noxfile.py")),
]

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


SHOWN = ("text", "mermaid")

# A whole file, which has a test of its own.
INCLUDED = re.compile(r'--8<-- "(?P<path>examples/\w+\.py)"')


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks_of(text: str) -> list[Block]:
    found = []
    for match in FENCE.finditer(text):
        indent = len(match["indent"])
        lines = [line[indent:] for line in match["text"].splitlines()]
        first_line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(match["language"], "\n".join(lines), first_line))
    return found


@contextlib.contextmanager
def defaults_of_jax() -> Iterator[None]:
    """A page runs as the program of a reader does, without the strictness of our tests."""
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.check_tracer_leaks(False),
    ):
        yield


@contextlib.contextmanager
def fresh_module() -> Iterator[dict]:
    """A namespace that Python takes for that of a module: classes can be made in it."""
    module = types.ModuleType("program_in_the_docs")
    sys.modules[module.__name__] = module
    try:
        yield vars(module)
    finally:
        del sys.modules[module.__name__]


def run(block: Block, namespace: dict, file: Path) -> tuple[str, Exception | None]:
    """What a block prints, and what it raises."""
    printed = io.StringIO()
    # The empty lines are so that a traceback shows the line of the page.
    code = compile("\n" * (block.line - 1) + block.text, str(file), "exec")
    with contextlib.redirect_stdout(printed):
        try:
            exec(code, namespace)
        except Exception as e:
            return printed.getvalue(), e
    return printed.getvalue(), None


def as_shown(error: Exception | None) -> str:
    """The last line of a traceback, without notes (JAX adds one about its frames)."""
    if error is None:
        return ""
    shown = traceback.TracebackException.from_exception(error)
    shown.__notes__ = None
    return "".join(shown.format_exception_only()).rstrip("\n")


def words(text: str) -> str:
    return " ".join(text.split())


def run_page(text: str, file: Path) -> None:
    blocks = blocks_of(text)
    with fresh_module() as namespace:
        for i, block in enumerate(blocks):
            included = INCLUDED.fullmatch(block.text)
            if included:
                assert (ROOT / included["path"]).exists()
            elif block.language == "python":
                printed, error = run(block, namespace, file)
                after = blocks[i + 1 : i + 2]
                shown = [block.text for block in after if block.language in SHOWN]
                if error is not None and not shown:
                    raise error
                assert words(printed + as_shown(error)) == words("".join(shown))
                if isinstance(error, rx.RefError):
                    assert "".join(shown).endswith(as_shown(error))
            elif block.language in SHOWN:
                # Its own block compared it.
                assert i > 0 and blocks[i - 1].language == "python"
            else:
                assert block.language == "bash", f"{file}: a block is not executed"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_page(page):
    with defaults_of_jax():
        run_page(page.read_text(), page)


def docstrings_with_examples() -> list:
    """Every string in the package that stands alone and has a ```python block."""
    found = []
    for file in SOURCES:
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.Expr) and isinstance(
                    child.value, ast.Constant
                ):
                    text = child.value.value
                    if isinstance(text, str) and "```python" in text:
                        where = getattr(node, "name", f"line{child.lineno}")
                        id = f"{file.relative_to(ROOT / 'refx_eqx')}:{where}"
                        found.append(pytest.param(text, file, child.lineno, id=id))
    return found


@pytest.mark.parametrize("text, file, line", docstrings_with_examples())
def test_docstring(text, file, line):
    for block in blocks_of(text):
        assert block.language == "python"
        with fresh_module() as namespace:
            block = block._replace(line=block.line + line - 1)
            printed, error = run(block, namespace, file)
        if error is not None:
            raise error
        # An example shows its results by assertions.
        assert printed == "" and "assert " in block.text


NAMES = re.compile(r"(?<![-\w./])(?:rx|refx_eqx)\.([A-Za-z]\w*(?:\.[A-Za-z]\w*)*)")


@pytest.mark.parametrize(
    "file", [*PAGES, *SOURCES], ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_name_that_is_mentioned_exists(file):
    for name in NAMES.findall(file.read_text()):
        found = rx
        for part in name.split("."):
            found = getattr(found, part, None)
            assert found is not None, f"there is no `rx.{name}`"
            if not isinstance(found, types.ModuleType | type):
                break  # an attribute of a value: not ours to look up


# A reader searches for "optimizer". What other libraries call their own is theirs.
STEMS = (
    "analy author categor character custom discret emphas final general initial linear "
    "local material maxim memor minim normal optim organ parallel priorit quant random "
    "recogn regular serial special stabil standard summar synchron token util vector "
    "visual"
)
BRITISH = re.compile(
    rf"\b(?:de|re|un)?(?:{'|'.join(STEMS.split())})is(?:e[drs]?|ers|ing|ations?)\b"
    r"|\b(?:mis)?spelt\b|\b(?:learnt|whilst|amongst|artefacts?|licence|grey|centre)\b"
    r"|(?:behavi|neighb|col|fav|hon)our|(?:label|model|cancel|travel|channel)l(?:ed|ing)\b",
    re.IGNORECASE,
)
NOT_OURS = re.compile("(?:de)?serialise_leaves|whilst typechecking|optx.minimise")


@pytest.mark.parametrize("file", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_spelling_is_american(file):
    assert BRITISH.findall(NOT_OURS.sub("", file.read_text())) == []


# Phrases that are correct, but make a reader stop.
TURNS = re.compile(
    r"\b(?:[Bb]eside|[Aa]nybody|[Nn]obody|[Aa]new|[Hh]itherto|[Ii]n place of)\b"
    r'|(?:# |""")Of (?:an?|the|each|what|all|those|these)\b'
)


@pytest.mark.parametrize("file", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_prose_is_plain(file):
    assert TURNS.findall(file.read_text()) == []


def test_british_spelling_is_found():
    for word in ("optimiser", "Initialised", "behaviour", "deserialising", "labelled"):
        assert BRITISH.search(f"a {word}.")
    for word in ("raise", "noise", "precise", "optimistix", "otherwise", "normalizing"):
        assert not BRITISH.search(f"a {word}.")


PATH = re.compile(r"`((?:\w+/)+\w+\.(?:py|md|json)|_\w+\.py)`")


@pytest.mark.parametrize("file", WRITTEN, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_that_is_named_is_there(file):
    for path in PATH.findall(file.read_text()):
        folders = (ROOT, ROOT / "refx_eqx", file.parent)
        assert any((folder / path).exists() for folder in folders), path


LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#\s]+)(?:#(?P<anchor>[^)]+))?\)")


def anchors_of(file: Path) -> set[str]:
    """As GitHub and MkDocs make them of headings."""
    titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in titles
    }


# MkDocs checks those of the pages.
@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "refx_eqx/_core/README.md",
        "refx_eqx/_calls/README.md",
    ],
)
def test_the_links_of_a_file_lead_somewhere(name):
    found = list(LINK.finditer((ROOT / name).read_text()))
    assert found
    for link in found:
        target = (ROOT / name).parent / link["path"]
        assert target.exists(), link[0]
        assert link["anchor"] is None or link["anchor"] in anchors_of(target), link[0]


def test_the_site_shows_the_version_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    site = (ROOT / "mkdocs.yml").read_text()
    assert f"copyright: {project['name']} {project['version']}," in site
    has_repository = "repo_url" in site
    assert has_repository == ("Repository" in project.get("urls", {}))


def test_the_search_of_the_site_finds_a_name_in_code():
    site = (ROOT / "mkdocs.yml").read_text()
    (separator,) = re.findall(r"separator: '(.*)'", site)
    text = "`rx.as_refs(model)`, ref[...], {scan: a} = state-dict; b/c"
    words = "rx as_refs model ref scan a state dict b c"
    assert [x for x in re.split(separator, text) if x] == words.split()


def test_every_page_is_in_the_navigation_and_every_example_has_one():
    site = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert site.count(f" {page.relative_to(ROOT / 'docs')}\n") == 1
    for example in (ROOT / "examples").glob("[!_]*.py"):
        for page in (
            "README.md",
            "docs/examples.md",
            f"docs/examples/{example.stem}.md",
        ):
            assert f"examples/{example.name}" in (ROOT / page).read_text()


# Where a package comes from that is not a dependency.
FROM = {"optax": "optim|optax", "safetensors": "checkpoint", "flax": "flax"}
FROM |= {"orbax": "orbax-checkpoint"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_says_where_a_package_comes_from_before_it_is_used(page):
    text = page.read_text()
    for package, name in FROM.items():
        first, used, _ = text.partition(f"import {package}")
        first, used_from, _ = first.partition(f"from {package}")
        if used or used_from:
            line = text[len(first) :].partition("\n")[0]
            assert re.search(rf"pip install .*({name})", first + line), package


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_block_of_code_fits_its_column(page):
    for block in blocks_of(page.read_text()):
        too_wide = [line for line in block.text.splitlines() if len(line) > 88]
        assert too_wide == [] or block.language in ("mermaid", "bash")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_an_error_that_is_shown_is_indented_below_its_first_line(page):
    for block in blocks_of(page.read_text()):
        lines = iter(block.text.splitlines() if block.language == "text" else ())
        for line in lines:
            if re.match(r"[\w.]+Error: ", line):
                assert [x for x in lines if not x.startswith("    ")] == []


@pytest.mark.parametrize(
    "page",
    [
        "```python\nx = 1\n```\n```text\n2\n```",
        "```python\nprint(1)\n```\n```text\n2\n```",
        "```python\nprint(1)\n```",
        "```python\nraise ValueError('no')\n```",
        "```python\nraise ValueError('no')\n```\n```text\nValueError: yes\n```",
        "```text\n1\n```",
        "```\n1\n```",
        "!!! note\n\n    ```python\n    assert False\n    ```",
    ],
)
def test_a_page_that_is_wrong_is_found_out(page):
    with pytest.raises((AssertionError, ValueError)):
        run_page(page, Path("a page"))


def test_a_page_that_is_right_passes():
    page = (
        "```python\nx = 1\nprint(x)\nx.y\n```\n\n```text\n1\nAttributeError:\n{}\n```"
    )
    run_page(page.format("'int' object has no attribute 'y'"), Path("a page"))
