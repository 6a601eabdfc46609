"""What pyright and mypy say about the library's types, compared with what `types/` expects.

The files in `types/` must pass. Those in `types/expected_errors/` must fail, exactly on the
lines that end with `# E: rule | code`: pyright's rules and mypy's error codes (`-`: none).
"""

import json
import pathlib
import re
import subprocess
import sys

import pytest


TYPES = pathlib.Path(__file__).parent / "types"
PASSING = sorted(TYPES.glob("*.py"))
FAILING = sorted((TYPES / "expected_errors").glob("*.py"))

# (file, line, rule): one error of a checker.
Errors = set[tuple[str, int, str]]


def _run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=TYPES,
        capture_output=True,
        text=True,
        check=False,
    )
    # 0: nothing found, 1: errors found. Anything else is the checker's own trouble.
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pyright() -> Errors:
    # `types/` is a project of its own: that of the repository leaves the errors out.
    options = "--outputjson", "--pythonpath", sys.executable
    report = json.loads(_run("pyright", *options))
    assert report["summary"]["filesAnalyzed"] == len(PASSING) + len(FAILING)
    return {
        (
            pathlib.Path(found["file"]).relative_to(TYPES).as_posix(),
            found["range"]["start"]["line"] + 1,
            found["rule"],
        )
        for found in report["generalDiagnostics"]
    }


@pytest.fixture(scope="module")
def mypy(pytestconfig) -> Errors:
    cache = pytestconfig.cache.mkdir("mypy")
    # Each folder is a package: both have a file of each name.
    options = "--strict", "--explicit-package-bases", "--cache-dir", str(cache)
    output = _run("mypy", *options, ".")
    error = re.compile(r"^(.+?):(\d+): error: .*\[([\w-]+)\]$", re.MULTILINE)
    return {
        (pathlib.Path(file).as_posix(), int(line), code)
        for file, line, code in error.findall(output)
    }


def _expected(column: int) -> Errors:
    """What the comments say: `column` 0 is pyright's, 1 is mypy's."""
    expected: Errors = set()
    for file in FAILING:
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            _, marker, comment = line.partition("  # E: ")
            if marker:
                for rule in comment.split(" | ")[column].split(", "):
                    if rule != "-":
                        path = file.relative_to(TYPES).as_posix()
                        expected.add((path, number, rule))
    return expected


def test_pyright_reveals_what_is_asserted_and_refuses_what_is_wrong(pyright):
    assert pyright == _expected(0)


def test_mypy_reveals_what_is_asserted_and_refuses_what_is_wrong(mypy):
    assert mypy == _expected(1)


def test_there_is_something_to_compare():
    assert len(PASSING) == 3 and len(FAILING) == 2
    assert len(_expected(0)) > 35 and len(_expected(1)) > 35
