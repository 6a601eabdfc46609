"""Inspecting a tree of refs: its size, its placement, and what is shared."""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.sharding import NamedSharding
from jaxtyping import PyTree

from ._core._ref import Ref
from ._filters._check import also_in_functions
from ._filters._filters import FilterLike
from ._filters._select import (
    check_all_in_tree,
    check_can_select,
    choose,
    leaves_with_paths,
    refuse_derefed,
)
from ._transforms._jit import filter_jit
from ._trees._cells import is_lookup
from ._trees._closure import is_closure, opened
from ._trees._paths import dotted, key_text


def count(tree: PyTree, filter: FilterLike = True) -> int:
    """Counts the numbers in a tree, those of a shared ref once.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        shared = rx.Ref(jnp.zeros((3, 2)), "params")
        model = {"embed": shared, "unembed": shared, "step": rx.Ref(jnp.array(0), "counts")}
        assert rx.count(model) == 7
        assert rx.count(model, "params") == 6
        ```

    **Arguments:**

    - `tree`: a tree of refs. They must be readable here. A `jax.ShapeDtypeStruct` counts as
        the array it stands for.
    - `filter`: any filter, which selects the refs and the arrays outside refs to count.

    **Returns:**

    The sum of the sizes of all arrays. A Python number in a ref counts as one; outside refs
    it is static, and does not count.

    **Raises:**

    - `StructureError`: if `tree` is derefed, or if `filter` selects a ref at one of its
        places and not at another.
    - `RefTypeError`: if `filter` selects by collection or class, and a field that is declared
        a ref holds an array.
    - `TraceLevelError`: if a ref cannot be read here.
    """
    return sum(row.size for row in _rows(tree, filter) if row.tied_to is None)


def tabulate(tree: PyTree, /, *args: Any, flops: bool = False, **kwargs: Any) -> str:
    """A table of the contents of a tree: the place, collection, shape and size of each ref.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        shared = rx.Ref(jnp.zeros((3, 2)), "params")
        model = {"embed": shared, "unembed": shared, "step": rx.Ref(jnp.array(0), "counts")}
        table = rx.tabulate(model)
        assert "is embed" in table  # the other place of the shared ref
        ```

    It needs the package `rich`: `pip install 'refx_eqx[display]'`.

    **Arguments:**

    - `tree`: a tree of refs, such as a model. The refs must be readable here. A
        `jax.ShapeDtypeStruct` counts as the array it stands for.
    - `*args`, `**kwargs`: the arguments to call the model with, for `flops`. Nothing is
        computed, and no ref is written.
    - `flops`: whether to compile a call of the model and show the compiler's cost estimate.

    **Returns:**

    The table, as text: a row for each place of a ref, and for each array outside refs. A
    shared ref counts once, at its first place. Below it, the totals by collection. If
    something is on a mesh, there are two more columns: the `PartitionSpec`, and the bytes
    on each device. `rx.tabulate(rx.filter_shard(rx.filter_eval_shape(make), shardings))`
    thus shows a model before it is made.

    **Raises:**

    - `StructureError`: if `tree` is derefed.
    - `TraceLevelError`: if a ref cannot be read here.
    - `ValueError`: if there are arguments, but `flops` is not set.
    """
    if (args or kwargs) and not flops:
        raise ValueError(
            "`rx.tabulate`: arguments for a call are only used with `flops=True`. Pass "
            "that too, or just the model."
        )
    rows = list(_rows(tree, True))
    on_mesh = any(row.specs for row in rows)
    table = _rich_table(on_mesh)

    def add(*texts: str, spec: str = "", sizes: tuple[int, int, int]) -> None:
        n, nbytes, on_each = sizes
        more = [spec, _bytes_text(on_each)] if on_mesh else []
        table.add_row(*texts, f"{n:,}", _bytes_text(nbytes), *more)

    totals: dict[str, tuple[int, int, int]] = {}
    for row in rows:
        what = row.place, row.collection, row.type
        if row.tied_to is not None:
            table.add_row(*what, f"is {row.tied_to}")
            continue
        before = totals.get(row.collection, (0, 0, 0))
        n, nbytes, on_each = map(sum, zip(before, row.sizes))
        totals[row.collection] = n, nbytes, on_each
        add(*what, row.shape, row.dtype, spec=row.specs, sizes=row.sizes)
    table.add_section()
    for collection, sizes in totals.items():
        add("total", collection, "", "", "", sizes=sizes)
    if len(totals) > 1:
        n, nbytes, on_each = map(sum, zip(*totals.values()))
        add("total", "", "", "", "", sizes=(n, nbytes, on_each))
    text = _rendered(table)
    if flops:
        text += f"A call: {_flops(tree, args, kwargs):,.0f} FLOPs, as compiled.\n"
    return text


class _Row:
    """One row of a table: a place of a ref, or an array outside refs."""

    def __init__(self, place: str, leaf: Any, tied_to: str | None):
        self.place = place
        self.tied_to = tied_to
        if isinstance(leaf, Ref):
            value = leaf.value
            self.collection = "" if leaf.collection is None else str(leaf.collection)
            self.type = type(leaf).__name__
        else:
            value = leaf
            self.collection = "outside refs"
            self.type = ""
        leaves = jtu.tree_leaves(value)
        arrays = [_shape_of(leaf) for leaf in leaves if _is_array_like(leaf)]
        self.size = sum(array.size for array in arrays)
        nbytes = sum(array.size * array.dtype.itemsize for array in arrays)
        on_each = sum(_size_on_each(array) * array.dtype.itemsize for array in arrays)
        self.sizes = self.size, nbytes, on_each
        shardings = [
            x.sharding for x in arrays if isinstance(x.sharding, NamedSharding)
        ]
        self.specs = ", ".join(dict.fromkeys(str(x.spec) for x in shardings))
        if arrays and value is leaves[0]:
            self.shape = str(arrays[0].shape)
            # A Python number is not an array until it is traced.
            plain = isinstance(leaves[0], (bool, int, float, complex))
            self.dtype = type(leaves[0]).__name__ if plain else str(arrays[0].dtype)
        else:
            self.shape = eqx.tree_pformat(value, width=10_000)
            self.dtype = ""


def _is_array_like(leaf: Any) -> bool:
    return eqx.is_array_like(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)


def _shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    if hasattr(leaf, "dtype"):
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.ShapeDtypeStruct((), jnp.result_type(leaf))


def _size_on_each(array: jax.ShapeDtypeStruct) -> int:
    if not isinstance(array.sharding, NamedSharding):
        return array.size
    return math.prod(array.sharding.shard_shape(array.shape))


def _rows(tree: Any, filter: Any) -> Iterator[_Row]:
    pairs, _ = also_in_functions(tree)
    refuse_derefed(pairs, "Cannot look at the tree")
    check_all_in_tree(pairs, "Cannot look at the tree")
    check_can_select(tree, filter)
    chosen = choose(pairs, filter)
    first: dict[int, str] = {}
    for (path, leaf), answer in zip(pairs, chosen):
        place = dotted(path)
        if answer == 0 and isinstance(leaf, Ref):
            known = first.setdefault(id(leaf), place)
            yield _Row(place, leaf, None if known == place else known)
        elif answer == 0 and hasattr(leaf, "dtype") and _is_array_like(leaf):
            yield _Row(place, leaf, None)


def _bytes_text(n: int) -> str:
    size = float(n)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _rich_table(on_mesh: bool) -> Any:
    try:
        from rich.box import SIMPLE
        from rich.table import Table
    except ImportError:
        raise ImportError(
            "`rx.tabulate` needs the package `rich`: `pip install 'refx_eqx[display]'`."
        ) from None
    table = Table(box=SIMPLE)
    for name in ("path", "collection", "type", "shape", "dtype"):
        table.add_column(name)
    for name in ("count", "bytes"):
        table.add_column(name, justify="right")
    if on_mesh:
        table.add_column("spec")
        table.add_column("on each device", justify="right")
    return table


def _rendered(table: Any) -> str:
    from rich.console import Console

    # As wide as the table, because the text may go to a file.
    console = Console(width=10_000, color_system=None, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    return (
        "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines())
        + "\n"
    )


def _flops(model: Any, args: tuple, kwargs: dict[str, Any]) -> float:
    step: Any = filter_jit(lambda model, *args, **kwargs: model(*args, **kwargs))
    costs = step.lower(model, *args, **kwargs).compile().cost_analysis()
    return (costs or {}).get("flops", float("nan"))  # not every backend knows


def mermaid(tree: PyTree) -> str:
    """Draws a tree of refs, in which a shared ref is one box with several arrows. A function
    that holds a ref is a box too.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        shared = rx.Ref(jnp.zeros((3, 2)), "params")
        text = rx.mermaid({"embed": shared, "unembed": shared})
        assert text.startswith("graph LR") and text.count("f32[3,2]") == 1
        ```

    **Arguments:**

    - `tree`: a tree of refs. It may be called anywhere: values are shown without the trace
        rule.

    **Returns:**

    A graph as [Mermaid](https://mermaid.js.org) text, which GitHub, Jupyter and MkDocs
    render.

    **Raises:**

    - `StructureError`: if `tree` is derefed, or a ref is only in a set, or among the keys of
        a dict.
    """
    pairs, _ = leaves_with_paths(tree)
    refuse_derefed(pairs, "Cannot draw the tree")
    check_all_in_tree(pairs, "Cannot draw the tree")
    nodes: list[str] = []
    arrows: list[str] = []
    n_arrows: Counter[str] = Counter()
    refs: dict[Ref, str] = {}

    def visit(node: Any) -> str | None:
        """The name of the box of a node, or `None` if it contains no ref."""
        if is_lookup(node):
            return None
        if isinstance(node, Ref):
            if node not in refs:
                refs[node] = f"r{len(refs)}"
                nodes.append(f"    {refs[node]}([{_label(*_lines_of(node))}])")
            return refs[node]
        name = f"n{len(nodes)}"
        at = len(nodes)
        kind = node.kind if is_closure(node) else type(node)
        nodes.append(f"    {name}[{_label(kind.__name__)}]")
        found = False
        children, _ = jtu.tree_flatten_with_path(
            node, is_leaf=lambda x, node=node: x is not node
        )
        for path, child in children:
            if path and (box := visit(child)) is not None:
                found = True
                n_arrows[box] += 1
                text = _label(".".join(map(key_text, path)))
                arrows.append(f"    {name} -->|{text}| {box}")
        if not found:
            del nodes[at:]
        return name if found else None

    visit(opened(tree))
    shared = ",".join(box for box in refs.values() if n_arrows[box] > 1)
    if shared:
        arrows += ["    classDef shared stroke-width:3px", f"    class {shared} shared"]
    return "\n".join(["graph LR", *nodes, *arrows])


def _lines_of(ref: Ref) -> tuple[str, ...]:
    # Without the trace rule: a drawing may contain a ref that cannot be read here.
    value = eqx.tree_pformat(ref._value, width=10_000)
    return value, "" if ref.collection is None else str(ref.collection)


def _label(*lines: str) -> str:
    text = "<br>".join(line for line in lines if line)
    return '"' + text.replace('"', "#quot;") + '"'
