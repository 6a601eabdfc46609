"""The one entry point: `python -m nox -s demo`, `-s tests`, and what `-l` lists.

Each session creates its own environment, so nox is all that has to be installed.
"""

import pathlib

import nox


nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False
nox.options.sessions = ["lint", "types", "tests"]

# One version, because the next may format differently.
RUFF = "ruff==0.17.6"

PYTHONS = ("3.11", "3.12", "3.13")

# The lower bounds in `pyproject.toml`. JAX and jaxlib come in pairs.
OLDEST = (
    "jax==0.10.0",
    "jaxlib==0.10.0",
    "equinox==0.13.8",
    "jaxtyping==0.3.11",
    "beartype==0.23.1",
)

# Two workers, each on a half of the files; the one that ends first takes from the other.
PYTEST = ("python", "-m", "pytest", "-n", "2", "--dist", "worksteal")


@nox.session
def demo(session: nox.Session) -> None:
    """Trains a network on handwritten digits, for half a minute."""
    session.install("-e", ".[examples]")
    session.run("python", "examples/train_digits.py", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """The tests, on the Python that runs nox and the newest dependencies."""
    session.install("-e", ".[examples,tests,types]")
    session.run(*PYTEST, *session.posargs)


# What shows soonest that something is broken.
QUICK = (
    *("deref", "ref", "update_refs", "partition", "filters", "trace", "functionalize"),
    *("jit", "grad", "vmap", "loops", "branches", "package"),
)


@nox.session
def quick(session: nox.Session) -> None:
    """The core tests: under three minutes on two cores."""
    session.install("-e", ".[examples,tests,types]")
    files = [f"tests/test_{name}.py" for name in QUICK]
    session.run(*PYTEST, *files, *session.posargs)


@nox.session(python=PYTHONS)
@nox.parametrize("dependencies", ["oldest", "newest"])
def tests_matrix(session: nox.Session, dependencies: str) -> None:
    """The tests, on every Python that is present, with oldest and newest dependencies."""
    pins = OLDEST if dependencies == "oldest" else ()
    session.install("-e", ".[examples,tests,types]", *pins)
    session.run(*PYTEST, *session.posargs)


@nox.session
def interrupts(session: nox.Session) -> None:
    """An exception in every line that a lifted call runs, not only in some: half an hour.

    It prints how many lines each kind of call has. `-- -k scan` is for one kind.
    """
    session.install("-e", ".[tests]")
    every = {"REFX_INTERRUPT_EVERY": "1"}
    session.run(
        *PYTEST[:3], "-s", "tests/test_interrupts.py", *session.posargs, env=every
    )


@nox.session
def lint(session: nox.Session) -> None:
    """Ruff: the format, and the rules."""
    session.install(RUFF)
    session.run("ruff", "format", "--check", ".")
    session.run("ruff", "check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Pyright on source, tests and examples. (What it and mypy say to a user is tested.)"""
    session.install("-e", ".[examples,tests,types]")
    session.run("pyright", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, strictly: every warning is an error."""
    session.install("-e", ".[docs]")
    session.run("mkdocs", "build", "--strict", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """What a call costs, compared with `jax.jit`, Equinox and flax.nnx on the same work."""
    session.install("-e", ".[examples,tests]")
    session.run("python", "-m", "tests.benchmarks", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Random programs of reads and writes, for longer than the tests take."""
    if not pathlib.Path("tests", "fuzz").is_dir():
        session.skip("There is no `tests/fuzz` in this checkout.")
    session.install("-e", ".[tests]")
    session.run("python", "-m", "tests.fuzz", *session.posargs)
