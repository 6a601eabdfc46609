"""`functionalize`: the pure function that the lifted transforms are made of."""

import subprocess
import sys
import textwrap

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array
from raising import raises

import refx_eqx as rx


class Model(rx.Module):
    w: rx.Param[Array]
    tied: rx.Param[Array]
    count: rx.Ref[Array] = rx.field(collection="counts")

    def __init__(self):
        self.w = jnp.array([1.0, 2.0])
        self.tied = self.w
        self.count = jnp.array(0, jnp.int32)


def _step(model, x):
    model.count.value += 1
    return jnp.sum(model.tied.value * x)


def test_nothing_is_written_until_the_updates_are_applied():
    model = Model()
    args = (model, jnp.ones(2))
    out, updates = rx.functionalize(_step)(*rx.deref(args))
    assert out == 3.0 and model.count.value == 0
    rx.update_refs(args, updates)
    assert model.count.value == 1


def test_the_updates_have_only_what_was_written():
    model = Model()
    w = model.w.value
    args = (model, jnp.ones(2))
    _, updates = rx.functionalize(_step)(*rx.deref(args))
    assert [leaf.shape for leaf in jax.tree.leaves(updates)] == [()]
    updated, bare = updates
    assert updated.w.value is None and updated.count.value == 1 and bare is None
    rx.update_refs(args, updates)
    assert model.w.value is w


def test_to_assign_what_is_there_is_a_write():
    def step(model):
        model.w.value = model.w.value

    model = Model()
    _, (updated,) = rx.functionalize(step)(*rx.deref((model,)))
    assert jnp.array_equal(updated.w.value, jnp.array([1.0, 2.0]))
    assert updated.count.value is None


def test_what_a_repeated_call_inside_writes_for_the_first_time_is_written():
    @rx.filter_jit
    def add_vectors(ref, x):
        if x.ndim == 1:
            ref.value = ref.value + x.sum()

    def body(ref):
        for _ in range(5):
            add_vectors(ref, jnp.array(1.0))
        add_vectors(ref, jnp.ones(2))

    _, (updated,) = rx.functionalize(body)(*rx.deref((rx.Ref(jnp.array(1.0)),)))
    assert updated.value == 3.0


def test_a_tied_ref_is_updated_through_its_first_place():
    def step(model):
        model.tied.value = model.w.value * 2.0

    model = Model()
    _, updates = rx.functionalize(step)(*rx.deref((model,)))
    assert jnp.array_equal(updates[0].w.value, jnp.array([2.0, 4.0]))
    assert isinstance(updates[0].tied, rx.Index)
    rx.update_refs((model,), updates)
    assert jnp.array_equal(model.tied.value, jnp.array([2.0, 4.0]))


def test_sharing_between_arguments():
    def step(a, b):
        a.value += 1.0
        b.value *= 3.0

    ref = rx.Ref(jnp.array(1.0))
    args = (ref, ref)
    _, updates = rx.functionalize(step)(*rx.deref(args))
    rx.update_refs(args, updates)
    assert ref.value == 6.0


def test_keyword_arguments():
    def step(x, *, count):
        count.value += 1
        return x

    count = rx.Ref(jnp.array(0))
    args, kwargs = (jnp.ones(2),), {"count": count}
    opened_args, opened_kwargs = rx.deref((args, kwargs))
    _, updates = rx.functionalize(step)(*opened_args, **opened_kwargs)
    rx.update_refs((args, kwargs), updates)
    assert count.value == 1


def test_the_result_is_derefed():
    def step(ref):
        ref.value += 1.0
        new = rx.Ref(ref.value * 2.0, "params")
        return [ref, new, new]

    ref = rx.Ref(jnp.array(1.0), "counts")
    out, _ = rx.functionalize(step)(*rx.deref((ref,)))
    again, new, same = rx.reref(out)
    assert again.value == 2.0 and again.collection == "counts"  # as it is after
    assert new is same and new.value == 4.0


def test_any_transform_takes_it():
    model, x = Model(), jnp.ones(2)
    pure = rx.functionalize(_step)

    def loss(opened, x):
        out, updates = pure(opened, x)
        return out, updates

    opened = rx.deref(model)
    params, rest = eqx.partition(opened, rx.filter_spec(model, "params"))
    grads, updates = jax.jit(
        jax.grad(lambda p, x: loss(eqx.combine(p, rest), x), has_aux=True)
    )(params, x)
    assert jnp.array_equal(grads.w.value, jnp.ones(2))
    rx.update_refs((model, x), updates)
    assert model.count.value == 1

    out, _ = jax.vmap(pure, in_axes=(None, 0))(opened, jnp.ones((4, 2)))
    assert out.shape == (4,)


def test_the_arguments_must_be_derefed():
    with raises(
        rx.StructureError, match="a tree that already holds refs.*Call `rx.deref`"
    ):
        rx.functionalize(_step)(Model(), jnp.ones(2))


def test_a_change_of_structure_is_refused():
    def step(refs):
        refs.append(rx.Ref(jnp.zeros(1)))

    text = "`functionalize` cannot carry back a change of structure"
    with raises(rx.StructureError, match=text):
        rx.functionalize(step)(*rx.deref(([rx.Ref(jnp.zeros(1))],)))


def test_a_write_to_what_is_no_argument_is_refused():
    count, w = rx.Ref(jnp.array(0), "counts"), rx.Ref(jnp.array(2.0))

    def step(w):
        count.value += 1
        return w.value * count.value

    text = r"`functionalize`: `.*step` writes an unnamed ref \(collection 'counts'\).*Pass the"
    with raises(rx.StructureError, match=text):
        rx.functionalize(step)(*rx.deref((w,)))
    assert count.value == 0
    out, _ = rx.functionalize(lambda w: w.value * count.value)(*rx.deref((w,)))
    assert out == 0.0  # reading is no write

    def passed(w, count):  # the remedy
        count.value += 1
        return w.value * count.value

    out, updates = rx.functionalize(passed)(*rx.deref((w, count)))
    rx.update_refs((w, count), updates)
    assert out == 2.0 and count.value == 1


def test_a_new_process_without_the_package_runs_an_exported_step(tmp_path):
    model, x = Model(), jnp.array([3.0, 4.0])
    args = (model, x)
    leaves, treedef = jax.tree.flatten(rx.deref(args))

    @jax.jit
    def flat(*leaves):
        result = rx.functionalize(_step)(*jax.tree.unflatten(treedef, leaves))
        return jax.tree.leaves(result)

    exported = jax.export.export(flat)(*leaves)
    path = tmp_path / "step.bin"
    path.write_bytes(exported.serialize())
    program = f"""
        import sys
        sys.modules["refx_eqx"] = None  # not to be had
        import jax, jax.export, jax.numpy as jnp

        with open({str(path)!r}, "rb") as file:
            step = jax.export.deserialize(bytearray(file.read()))
        leaves = jnp.array([1.0, 2.0]), jnp.array(5, jnp.int32), jnp.array([3.0, 4.0])
        out, count = step.call(*leaves)
        print(float(out), int(count))
    """
    out = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.split() == ["11.0", "6"]
