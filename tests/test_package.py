"""The package as a whole: what an import does, who imports whom, and what is public."""

import ast
import builtins
import dataclasses
import inspect
import pathlib
import re
import subprocess
import sys
import textwrap
import typing

import pytest

import refx_eqx as rx


ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "refx_eqx"


def run_python(code: str, stderr: str | None = None) -> str:
    """Runs `code` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert stderr is None or done.stderr == stderr
    return done.stdout


# Importing


def test_importing_starts_no_backend():
    out = run_python(
        """
        import refx_eqx
        import jax.extend.backend
        from jax._src import xla_bridge
        print(xla_bridge.backends_are_initialized())
        import jax.numpy as jnp
        jnp.zeros(1)
        print(xla_bridge.backends_are_initialized())
        """
    )
    assert out.split() == ["False", "True"]


def test_importing_takes_no_longer_than_importing_equinox():
    code = """
        from time import perf_counter
        start = perf_counter()
        import equinox
        between = perf_counter()
        import refx_eqx
        print(between - start, perf_counter() - between)
        """
    runs = [tuple(map(float, run_python(code).split())) for _ in range(4)]
    equinox, ours = (min(times) for times in zip(*runs))
    assert ours < equinox


def test_nothing_is_printed_at_exit_by_what_forgets_dead_functions():
    run_python(
        """
        import sys
        import jax.numpy as jnp
        import refx_eqx as rx
        from refx_eqx._calls import _structure

        init = _structure.Key.__init__

        def with_one_hash(self, *args):  # so that keys are compared
            init(self, *args)
            self._hash = 0

        _structure.Key.__init__ = with_one_hash
        call = rx.filter_jit(lambda fn, x: fn(x))
        fns = [lambda x: x + 1, lambda x: x + 2]
        for fn in fns:
            call(fn, jnp.ones(2))
        sys.modules["builtins"].kept = call, fns  # until all else is gone
        """,
        stderr="",
    )


def test_importing_changes_nothing_for_others():
    out = run_python(
        """
        import logging, os, random, sys, threading, warnings
        import jax, equinox, jaxtyping, beartype.door

        def state():
            return dict(
                config={name: jax.config._read(name) for name in jax.config.values},
                warnings=list(warnings.filters),
                environment=dict(os.environ),
                random=random.getstate(),
                threads=threading.active_count(),
                root_logger=(logging.root.level, list(logging.root.handlers)),
                hooks=(sys.excepthook, sys.displayhook, list(sys.meta_path)),
                path=list(sys.path),
                recursion=sys.getrecursionlimit(),
            )

        before = state()
        import refx_eqx
        after = state()
        print([name for name in before if before[name] != after[name]])
        """
    )
    assert out.strip() == "[]"


def test_pytest_leaves_out_the_frames_of_every_module():
    assert rx.nn.Linear
    modules = [
        m for name, m in sys.modules.items() if f"{name}.".startswith("refx_eqx.")
    ]
    assert len(modules) > 100
    assert [m for m in modules if not getattr(m, "__tracebackhide__", False)] == []


def test_the_version_is_that_of_the_project():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(rf'^version = "{re.escape(rx.__version__)}"$', text, re.MULTILINE)
    assert (PACKAGE / "py.typed").exists()


# Layers: a file imports only from its own room and from those before it. What is in no
# room is built on top of all of them.

ROOMS = [
    "_trees",
    "_core",
    "_calls",
    "_fields",
    "_filters",
    "_sharding",
    "_engine",
    "_transforms",
]


def modules() -> dict[str, set[str]]:
    """Each module of the package, such as `_transforms._jit`, with those it imports."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        here = file.relative_to(PACKAGE).with_suffix("").parts
        imported = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = here[: len(here) - node.level]
                if node.module:
                    imported.add(".".join((*base, *node.module.split("."))))
                else:
                    imported |= {".".join((*base, a.name)) for a in node.names}
        found[".".join(here)] = imported
    return found


def room_of(module: str) -> int:
    top = module.split(".")[0]
    return ROOMS.index(top) if top in ROOMS else len(ROOMS)


def test_imports_follow_the_layers():
    wrong = [
        f"{module} imports {other}"
        for module, imported in modules().items()
        for other in imported
        if module != "__init__" and room_of(other) > room_of(module)
    ]
    assert wrong == []


def test_the_rooms_are_the_folders_of_the_package():
    folders = {x.parent.name for x in PACKAGE.glob("*/*.py")}
    assert set(ROOMS) <= folders


def test_there_are_no_import_cycles():
    graph = modules()
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module in graph and module not in finished:
            for other in graph[module]:
                visit(other, (*path, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def test_only_one_file_touches_the_internals_of_jax():
    touching = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.Attribute) and node.attr == "_src":
                names = ["jax._src"]
            if any(name.split(".")[:2] == ["jax", "_src"] for name in names):
                touching.add(file.name)
    assert touching == {"_jax.py"}


def defined_in(body: list[ast.stmt]) -> set[str]:
    """The names that the statements of a module define."""
    found = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {x.id for x in node.targets if isinstance(x, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


def test_a_private_name_means_one_thing_in_the_whole_package():
    homes: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        for name in defined_in(ast.parse(file.read_text()).body):
            if re.match(r"_[^_]", name):
                homes.setdefault(name, []).append(str(file.relative_to(PACKAGE)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


# The surface

PUBLIC = sorted(name for name in dir(rx) if not name.startswith("_"))


def test_no_name_is_public_by_accident():
    (tree,) = [ast.parse((PACKAGE / "__init__.py").read_text())]
    exported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            for alias in node.names:
                assert alias.asname == alias.name, (
                    f"write `{alias.name} as {alias.name}`"
                )
                exported.add(alias.name)
    # They are imported for what they do to the package.
    assert exported == {*PUBLIC, "_errors", "_export"}


def documented() -> set[str]:
    pages = [page.read_text() for page in (ROOT / "docs" / "api").glob("*.md")]
    return set(re.findall(r"^::: refx_eqx\.(\w+)$", "\n".join(pages), re.MULTILINE))


def test_the_docs_have_every_public_name_and_no_other():
    assert documented() == set(PUBLIC)


def test_the_docs_have_every_layer_and_no_other():
    page = (ROOT / "docs" / "api" / "nn.md").read_text()
    own = re.findall(r"^::: refx_eqx\.nn\.(\w+)$", page, re.MULTILINE)
    of_equinox = re.findall(r"^\| `(\w+)`", page, re.MULTILINE)
    layers = [name for name in dir(rx.nn) if not name.startswith("_")]
    assert sorted(own + of_equinox) == layers
    for name in own:
        assert "!!! Example" in getattr(rx.nn, name).__doc__, name


def is_error(thing) -> bool:
    return isinstance(thing, type) and issubclass(thing, Exception)


ERRORS = {getattr(rx, name) for name in PUBLIC if is_error(getattr(rx, name))}
FUNCTIONS = [name for name in PUBLIC if inspect.isfunction(getattr(rx, name))]
CLASSES = [
    name
    for name in PUBLIC
    if inspect.isclass(getattr(rx, name)) and not is_error(getattr(rx, name))
]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_takes_and_returns_with_an_example(name):
    function = getattr(rx, name)
    text = inspect.getdoc(function) or ""
    assert "!!! Example" in text and "```python" in text
    # "As for [`refx_eqx.scan`][]": the text of that one counts too.
    for other in re.findall(r"as for\s+\[`refx_eqx\.(\w+)`\]", text):
        text += inspect.getdoc(getattr(rx, other)) or ""
    parameters = list(inspect.signature(function).parameters.values())
    _, _, arguments = text.partition("**Arguments:**")
    for parameter in parameters:
        assert f"`{parameter.name}`" in arguments or (
            f"`*{parameter.name}`" in arguments or f"`**{parameter.name}`" in arguments
        ), f"{name}: `{parameter.name}` is not documented"
    # What gives nothing back says so by its annotation.
    returns = inspect.signature(function).return_annotation
    assert "**Returns:**" in text or returns is None or name == "mutable"


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_has_a_docstring_with_its_arguments(name):
    cls = getattr(rx, name)
    text = inspect.getdoc(cls) or ""
    assert len(text) > 40
    if "__init__" in vars(cls) and not dataclasses.is_dataclass(cls):
        for parameter in list(inspect.signature(cls).parameters):
            assert f"`{parameter}`" in text or f"`**{parameter}`" in text, parameter


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_has_an_example_and_its_public_methods_a_docstring(name):
    cls = getattr(rx, name)
    assert "!!! Example" in (inspect.getdoc(cls) or "")
    for method, function in vars(cls).items():
        if inspect.isfunction(function) and not method.startswith("_"):
            assert inspect.getdoc(function), f"{name}.{method}"


# They read no value, so there is nothing that they could refuse.
NEVER_RAISE = {"aliases", "is_ref"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_says_what_it_raises(name):
    text = inspect.getdoc(getattr(rx, name)) or ""
    assert (
        "**Raises:**" in text
        or re.search(r"as for\s+\[`refx_eqx", text)
        or (name in NEVER_RAISE)
    )


def raised_by(function) -> set[type[Exception]]:
    """What a function raises by itself, not in what it calls."""
    function = inspect.unwrap(function)
    if not pathlib.Path(function.__code__.co_filename).exists():
        return set()  # a dataclass made it
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    inner = {
        node
        for inner in ast.walk(tree)
        if isinstance(inner, ast.FunctionDef) and inner is not tree.body[0]
        for node in ast.walk(inner)
    }
    names = {
        ast.unparse(node.exc.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
        if node not in inner
    }
    scope = {**vars(builtins), **function.__globals__}
    found = {eval(name, scope) for name in names if name != "NotImplementedError"}
    return {error for error in found if is_error(error)}


def own_methods(cls) -> list:
    """The public methods of a class that are written in this package."""
    functions = [getattr(f, "fget", f) for f in vars(cls).values()]
    return [
        f
        for f in functions
        if inspect.isfunction(f) and f.__module__.startswith("refx_eqx")
        if f.__name__ in ("__init__", "__call__", "__setattr__", "__setitem__")
        or not f.__name__.startswith("_")
    ]


RAISING = [
    pytest.param(function, text, id=f"{prefix}{name}.{function.__name__}")
    for prefix, room in (("", rx), ("nn.", rx.nn))
    for name in dir(room)
    if not name.startswith("_") and not is_error(public := getattr(room, name))
    for functions in [own_methods(public) if inspect.isclass(public) else [public]]
    for function in functions
    if inspect.isfunction(function) and function.__module__.startswith("refx_eqx")
    if raised_by(function)
    for text in [(inspect.getdoc(function) or "") + (inspect.getdoc(public) or "")]
]


@pytest.mark.parametrize(("function", "text"), RAISING)
def test_an_error_that_is_raised_is_in_the_docstring(function, text):
    _, _, raises = text.partition("**Raises:**")
    for error in raised_by(function):
        # By its own name, or that of an error of the package that it is one of.
        names = {c.__name__ for c in error.__mro__ if c is error or c in ERRORS}
        assert any(f"{name}`" in raises for name in names), error


def test_the_search_for_what_is_raised_finds_something():
    assert len(RAISING) > 30


# Those with a docstring of ours: the others have that of Equinox.
OWN_LAYERS = re.findall(
    r"^::: refx_eqx\.nn\.([A-Z]\w+)$",
    (ROOT / "docs" / "api" / "nn.md").read_text(),
    re.MULTILINE,
)


@pytest.mark.parametrize("name", OWN_LAYERS)
def test_a_layer_says_what_it_and_its_methods_take(name):
    cls = getattr(rx.nn, name)
    text = inspect.getdoc(cls) or ""
    for parameter in inspect.signature(cls).parameters:
        assert f"`{parameter}`" in text, f"{name}: `{parameter}`"
    for method, function in vars(cls).items():
        public = method == "__call__" or not method.startswith("_")
        if not inspect.isfunction(function) or not public:
            continue
        text = inspect.getdoc(function) or ""
        signature = inspect.signature(function)
        for parameter in list(signature.parameters)[1:]:
            assert f"`{parameter}`" in text, f"{name}.{method}: `{parameter}`"


@pytest.mark.parametrize("name", FUNCTIONS + CLASSES)
def test_a_signature_shows_types_and_nothing_private(name):
    public = getattr(rx, name)
    if inspect.isclass(public) and public.__init__ is object.__init__:
        return
    for function in [*typing.get_overloads(public), public]:
        signature = inspect.signature(function)
        # A name that begins with an underscore, and is no module on the way to another.
        assert not re.search(r"(?<!\w)_\w+(?![\w.])| object at ", str(signature))
        # A field is annotated by its class: whatever it is there.
        assert signature.return_annotation is not typing.Any or name == "field"
        for parameter in signature.parameters.values():
            assert parameter.annotation is not parameter.empty, parameter


def test_every_error_has_a_docstring_of_its_own():
    errors = [getattr(rx, name) for name in PUBLIC if is_error(getattr(rx, name))]
    assert len(errors) >= 7
    texts = {error.__doc__ for error in errors}
    assert None not in texts and len(texts) == len(errors)


# Garbage


def test_making_and_calling_a_model_leaves_no_garbage_cycles():
    out = run_python(
        """
        import gc
        import jax, jax.numpy as jnp, refx_eqx as rx
        from jaxtyping import Array, Float, Int

        class Linear(rx.Module):
            weight: rx.Param[Float[Array, "n n"]]
            tied: rx.Param[Float[Array, "n n"]]
            uses: rx.Ref[Int[Array, ""]] = rx.field(collection="counts")

            def __init__(self, n):
                self.weight = jnp.ones((n, n))
                self.tied = self.weight
                self.uses = jnp.array(0)

            def __call__(self, x):
                self.uses.value += 1
                return self.tied[...] @ (self.weight[...] @ x)

        @rx.filter_jit
        def step(model, x):
            return jnp.sum(model(x))

        x = jnp.ones(2)

        def once():
            model = Linear(2)
            model(x)
            step(model, x)
            rx.reref(rx.deref(model))
            rx.clone(model)
            rx.combine(*rx.partition(model, "params"))

        once()
        once()
        gc.collect()
        gc.disable()
        once()
        print(gc.collect())
        """
    )
    assert out.strip() == "0"
