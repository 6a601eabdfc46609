"""What `count`, `tabulate`, `mermaid` and treescope show of a tree, and of what it shares."""

# A static checker objects to what is wrong on purpose here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import functools
import os
import re
import subprocess
import sys
import textwrap
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
import treescope
from raising import raises

import refx_eqx as rx


class Lora(rx.Ref):
    pass


def make():
    shared = rx.Ref(jnp.zeros((3, 2)), "params")
    return {
        "embed": shared,
        "layers": [rx.Ref(jnp.ones(4, jnp.bfloat16), "params"), Lora(1.5)],
        "step": rx.Ref(jnp.array(0), "counts"),
        "table": np.zeros(5, np.float32),
        "rate": 0.1,
        "unembed": shared,
    }


def cells(table):
    rows = [re.split(r"  +", line.strip()) for line in table.splitlines()]
    return [row for row in rows if len(row) > 1]


# count


@pytest.mark.parametrize(
    "filter, n",
    [
        (True, 6 + 4 + 1 + 1 + 5),
        (rx.Ref, 12),
        ("params", 10),
        (rx.collection("params", "counts"), 11),
        (Lora, 1),
        (rx.path("layers.*"), 5),
        (rx.path("table"), 5),
        (False, 0),
    ],
)
def test_the_numbers_that_a_filter_selects_are_counted_a_shared_ref_once(filter, n):
    assert rx.count(make(), filter) == n


def test_a_value_that_is_a_pytree_is_counted_as_a_whole():
    assert rx.count(rx.Ref({"mean": jnp.zeros(3), "n": 2, "name": "relu"})) == 4


def test_what_functions_hold_is_counted_and_has_a_row():
    ref, array = rx.Ref(jnp.ones(2), "params"), jnp.ones(5)
    for held in (array,), (array, ref):
        f = functools.partial(max, *held)
        tree = {"w": ref, "f": f}
        assert rx.count(tree) == 7 and rx.count(tree, "params") == 2
        rows = cells(rx.tabulate(tree))
        assert ["f.args.0", "outside refs", "(5,)", "float32", "5", "20 B"] in rows
    optimizer = rx.Optimizer(tree, optax.sgd(array))
    assert rx.count(optimizer) == 0  # the options of an Optax transformation


def test_keys_and_shapes_are_counted():
    assert rx.count(rx.Ref(jr.split(jr.key(0), 3))) == 3
    assert rx.count(rx.filter_eval_shape(make)) == rx.count(make())


def test_a_filter_that_tears_a_tie_is_refused():
    with raises(rx.StructureError, match="would tear it apart"):
        rx.count(make(), rx.path("embed"))


@pytest.mark.parametrize("look", [rx.count, rx.tabulate, rx.mermaid])
def test_a_derefed_tree_is_refused(look):
    with raises(rx.StructureError, match="Pass the tree of refs itself"):
        look(rx.deref(make()))


# tabulate


def test_each_place_has_a_row_and_each_collection_a_total():
    assert cells(rx.tabulate(make())) == [
        ["path", "collection", "type", "shape", "dtype", "count", "bytes"],
        ["embed", "params", "Ref", "(3, 2)", "float32", "6", "24 B"],
        ["layers.0", "params", "Ref", "(4,)", "bfloat16", "4", "8 B"],
        ["layers.1", "Lora", "()", "float", "1", "4 B"],
        ["step", "counts", "Ref", "()", "int32", "1", "4 B"],
        ["table", "outside refs", "(5,)", "float32", "5", "20 B"],
        ["unembed", "params", "Ref", "is embed"],
        ["total", "params", "10", "32 B"],
        ["total", "1", "4 B"],
        ["total", "counts", "1", "4 B"],
        ["total", "outside refs", "5", "20 B"],
        ["total", "17", "60 B"],
    ]


def test_large_numbers_can_be_read():
    shapes = {"w": rx.Ref(jax.ShapeDtypeStruct((40_000, 40_000), jnp.float32))}
    assert cells(rx.tabulate(shapes))[1][-2:] == ["1,600,000,000", "6.0 GiB"]


def test_a_value_of_another_kind_is_shown():
    tree = [rx.Ref("relu"), rx.Ref({"mean": jnp.zeros(2)}), rx.Ref(jr.key(0), "rng")]
    rows = cells(rx.tabulate(tree))
    assert rows[1][2] == "'relu'" and rows[2][2] == "{'mean': f32[2]}"
    assert rows[3][4] == "key<fry>"


def test_what_is_in_brackets_is_no_markup():
    assert cells(rx.tabulate({"[bold]": rx.Ref(1)}))[1][0] == "[bold]"


def test_the_cost_of_a_call_is_that_of_the_compiled_program():
    linear = rx.as_refs(eqx.nn.Linear(8, 8, use_bias=False, key=jr.key(0)), "params")
    model = eqx.nn.Lambda(lambda x: linear.weight.value @ x)
    plain = (
        jax.jit(lambda w, x: w @ x).lower(linear.weight.value, jnp.ones(8)).compile()
    )
    costs = plain.cost_analysis()
    assert costs is not None
    last = rx.tabulate(model, jnp.ones(8), flops=True).splitlines()[-1]
    assert last == f"A call: {costs['flops']:,.0f} FLOPs, as compiled."


def test_arguments_without_a_question_are_refused():
    with raises(ValueError, match="Pass that too, or just the model"):
        rx.tabulate(make(), jnp.ones(3))


def test_a_missing_extra_is_named():
    code = """
        import sys
        sys.modules["rich.table"] = None
        import refx_eqx as rx
        try:
            rx.tabulate(rx.Ref(1))
        except ImportError as e:
            print(e)
        """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    text = (
        "`rx.tabulate` needs the package `rich`: `pip install 'refx_eqx[display]'`.\n"
    )
    assert done.stdout == text


# mermaid


def test_a_shared_ref_is_one_box_with_several_arrows():
    assert rx.mermaid(make()).splitlines() == [
        "graph LR",
        '    n0["dict"]',
        '    r0(["f32[3,2]<br>params"])',
        '    n2["list"]',
        '    r1(["bf16[4]<br>params"])',
        '    r2(["1.5"])',
        '    r3(["weak_i32[]<br>counts"])',
        '    n0 -->|"embed"| r0',
        '    n2 -->|"0"| r1',
        '    n2 -->|"1"| r2',
        '    n0 -->|"layers"| n2',
        '    n0 -->|"step"| r3',
        '    n0 -->|"unembed"| r0',
        "    classDef shared stroke-width:3px",
        "    class r0 shared",
    ]


@pytest.mark.parametrize(
    ("holder", "box", "path"),
    [
        (lambda ref: lambda: ref, "function", ["ref"]),
        (lambda ref: functools.partial(len, ref), "partial", ["0", "args"]),
        (lambda ref: types.MethodType(len, ref), "method", ["__self__"]),
    ],
)
def test_what_a_function_holds_is_drawn(holder, box, path):
    ref = rx.Ref(jnp.ones(2), "params")
    lines = rx.mermaid({"f": holder(ref), "w": ref, "n": len}).splitlines()
    assert f'    n1["{box}"]' in lines and "    class r0 shared" in lines
    arrows = [line.split('"')[1] for line in lines if "-->" in line]
    assert arrows == [*path, "f", "w"]
    assert rx.mermaid(holder(ref)).count("r0") == 2


def test_what_is_not_in_the_tree_is_not_left_out_of_the_drawing():
    ref, key = rx.Ref(1, "params"), rx.Ref(2)
    for lookup in {ref}, {ref: 1, key: 2}, {"x": {(ref, 1)}}:
        with raises(rx.StructureError, match="Cannot draw the tree: .*'params'.*Hold"):
            rx.mermaid({"lookup": lookup})
        lines = rx.mermaid(
            {"lookup": lookup, "all": [ref, key]}
        ).splitlines()  # the remedy
        assert len([line for line in lines if "-->" in line]) == 3


def test_every_box_has_a_name_of_its_own():
    tree = [[1, [2]], [rx.Ref(1), [3]], {"a": [rx.Ref(2)]}, rx.Ref('a "text"')]
    lines = rx.mermaid(tree).splitlines()
    boxes = [m[1] for line in lines if (m := re.match(r"    (\w+)[\[(]", line))]
    assert len(boxes) == len(set(boxes)) == 7
    for line in lines:
        if "-->" in line:
            start, end = line.split()[0], line.split()[-1]
            assert start in boxes and end in boxes
    assert any("#quot;text#quot;" in x for x in lines)


def test_a_ref_can_be_the_whole_tree():
    assert rx.mermaid(rx.Ref(1)) == 'graph LR\n    r0(["1"])'
    assert rx.mermaid([1, 2]) == "graph LR"


# treescope


# treescope 0.1.10 looks at a class that NumPy deprecates.
@pytest.mark.filterwarnings("ignore:The chararray class is deprecated")
def test_treescope_marks_a_shared_ref():
    tree = make()
    text = treescope.render_to_text(tree)
    assert text.count("Repeated python obj") == 2
    assert "Lora(" in text and "collection='counts'" in text
    del tree["unembed"]
    assert "Repeated" not in treescope.render_to_text(tree)
    assert "float32(3, 2)" in treescope.render_to_text(tree)
