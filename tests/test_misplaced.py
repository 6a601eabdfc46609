"""A field that is declared a ref, but holds an array, is noticed at its first use."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportArgumentType=false

import copy
import dataclasses
import functools
import pickle
import re
from typing import TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import treescope
import wadler_lindig as wl
from jaxtyping import Array, Float
from raising import message_of, raises

import refx_eqx as rx


class Norm(rx.Module):
    scale: rx.Param[Float[Array, "n"]]
    mean: rx.BatchStat[Float[Array, "n"]]

    def __call__(self, x):
        self.mean.value = 0.9 * self.mean.value + 0.1 * x
        return self.scale.value * (x - self.mean.value)


class Plain(eqx.Module):
    scale: rx.Param[Array] = rx.field()
    mean: rx.BatchStat[Array] = rx.field()


class Layers(rx.Module):
    weights: list[rx.Param[Array]]


def norm():
    return Norm(jnp.ones(3), jnp.zeros(3))


def both_replaced(module):
    arrays = 2 * jnp.ones(3), 3 * jnp.ones(3)
    return eqx.tree_at(lambda m: (m.scale, m.mean), module, arrays)


TEXT = (
    r"`{}`.* is declared a ref, but holds f32\[3\] instead.* Put a ref there: "
    r"`eqx\.tree_at\(lambda m: m\..*, module, rx\.Ref\(value, '{}'\)\)`\."
)


def repaired(error, module, value):
    """The module, after what the message says to do was done to it."""
    notes = getattr(error, "__notes__", [])
    text = " ".join([message_of(error), *" ".join(notes).split()])
    remedy = re.search(r"put a ref there: `(.*?)`\.", text, re.IGNORECASE)
    assert remedy is not None, text
    return eval(remedy[1], {"eqx": eqx, "rx": rx, "module": module, "value": value})


@pytest.mark.parametrize(
    "make",
    [
        lambda m: eqx.tree_at(lambda m: m.mean, m, 3 * jnp.ones(3)),
        lambda m: eqx.combine(eqx.filter(m, rx.collection("params")), rx.snapshot(m)),
    ],
    ids=["tree_at", "combine"],
)
def test_a_method_that_reads_it(make):
    made = make(norm())
    with raises(rx.RefTypeError, match=TEXT.format("Norm.mean", "batch_stats")):
        rx.filter_jit(lambda m, x: m(x))(made, jnp.ones(3))
    with raises(rx.RefTypeError, match=TEXT.format("Norm.mean", "batch_stats")) as info:
        made(jnp.ones(3))
    mended = repaired(info.value, made, 3 * jnp.ones(3))
    mended(jnp.ones(3))
    assert jnp.allclose(mended.mean.value, 2.8)


def test_in_a_list():
    layers = Layers([jnp.ones(3), jnp.ones(3)])
    made = eqx.tree_at(lambda m: m.weights[1], layers, jnp.zeros(3))
    text = TEXT.format(r"Layers.weights\[1\]", "params")
    with raises(rx.RefTypeError, match=text) as info:
        len(made.weights)
    mended = repaired(info.value, made, jnp.zeros(3))
    assert [w[0] for w in mended.weights] == [1.0, 0.0]


T = TypeVar("T")


class Special(rx.Ref[T]):
    pass


class Holder(rx.Module):
    first: rx.Ref[Array]
    special: Special[Array]


def test_the_remedy_has_the_class_of_the_ref():
    holder = Holder(jnp.ones(3), Special(jnp.ones(3)))
    made = eqx.tree_at(lambda m: m.special, holder, jnp.zeros(3))
    with raises(rx.RefTypeError, match=r"module, Special\(value\)\)"):
        made.special  # noqa: B018


LOOKS = {
    "repr": repr,
    "format": lambda m: f"{m}",
    "tree_pformat": eqx.tree_pformat,
    "wadler_lindig": wl.pformat,
    "tabulate": rx.tabulate,
    "equality": lambda m: m == m,
    "flatten": jax.tree.leaves,
    "flatten with paths": jax.tree.leaves_with_path,
    "map": lambda m: jax.tree.map(lambda x: x, m),
    "copy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "replace": dataclasses.replace,
    "tree_at": lambda m: eqx.tree_at(lambda m: [x.mean for x in [m]], m, [0]),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_what_only_looks_at_a_module_finds_the_array(look):
    look(eqx.tree_at(lambda m: m.mean, norm(), jnp.zeros(3)))


# treescope 0.1.10 looks at a class that NumPy deprecates.
@pytest.mark.filterwarnings("ignore:The chararray class is deprecated")
def test_treescope_finds_the_array():
    half = eqx.tree_at(lambda m: m.mean, norm(), jnp.zeros(3))
    assert "mean=" in treescope.render_to_text(half)


def test_an_array_in_a_ref_s_place_is_printed():
    half = eqx.tree_at(lambda m: m.mean, norm(), jnp.zeros(3))
    assert repr(half) == 'Norm(scale=Ref(f32[3], "params"), mean=f32[3])'


def test_an_array_has_no_hash():
    half = eqx.tree_at(lambda m: m.mean, norm(), jnp.zeros(3))
    with pytest.raises(TypeError, match="unhashable"):
        hash(half)


def test_printing_does_not_hide_a_lost_write():
    made = both_replaced(norm())
    made.mean.value = jnp.ones(3)
    assert repr(made) == "Norm(scale=f32[3], mean=f32[3])"
    with raises(rx.RefTypeError, match="and a value written to it was lost") as info:
        made.scale  # noqa: B018
    repaired(info.value, made, jnp.ones(3))


def test_a_write_that_no_ref_took_is_told_when_it_is_read():
    made = both_replaced(norm())
    with raises(rx.RefTypeError, match="and a value written to it was lost"):
        made.mean.value = jnp.ones(3)  # on a JAX array, so nothing can stop it
        made.mean  # noqa: B018


class Tracking(rx.Module):
    scale: rx.Param[Array]
    mean: rx.BatchStat[Array]

    def __call__(self, x):
        self.mean.value = x  # and never read
        return self.scale[...] * x


def test_a_write_that_no_ref_took_is_told_at_the_next_door():
    module = Tracking(jnp.ones(3), jnp.zeros(3))
    made = both_replaced(module)
    text = r"`Tracking\.mean` is declared a ref, but holds .* and a value written to it"
    with raises(rx.RefTypeError, match=text):
        made(jnp.ones(3))
    # The remedy.
    stats = rx.Ref(3 * jnp.ones(3), "batch_stats"), rx.Ref(jnp.ones(3), "params")
    mended = eqx.tree_at(lambda m: (m.mean, m.scale), module, stats)
    assert mended(jnp.ones(3))[0] == 1.0 and mended.mean[0] == 1.0


def test_a_write_to_an_array_of_another_module_is_told_once():
    made, other = both_replaced(norm()), rx.snapshot(norm())
    made.mean.value = jnp.ones(3)
    with raises(rx.RefTypeError, match=r"`Norm\.mean`.* was lost"):
        other.scale  # noqa: B018
    assert other.scale[0] == 1.0


@pytest.mark.parametrize("cls", [Norm, Plain])
@pytest.mark.parametrize("lifted", [rx.filter_jit, rx.filter_grad, rx.filter_vmap])
def test_a_write_that_no_ref_took_is_told_by_a_lifted_transform(cls, lifted):
    made = both_replaced(cls(jnp.ones(3), jnp.zeros(3)))
    object.__getattribute__(made, "mean").value = jnp.ones(3)
    with raises(
        rx.RefTypeError, match=r"float32\[3\], an array outside refs whose `\.value = "
    ):
        lifted(lambda m: jnp.sum(object.__getattribute__(m, "scale")))(made)


def test_a_write_inside_a_transform_raises():
    def write(module):
        module.mean.value = jnp.ones(3)

    for transform in (jax.jit, rx.filter_jit, eqx.filter_jit):
        with pytest.raises(AttributeError):
            transform(write)(both_replaced(norm()))


@pytest.mark.parametrize(
    "door, failure",
    [
        (rx.state_dict, "Cannot make a state dict"),
        (lambda m: rx.load_state_dict(m, {}), "Cannot load the state"),
        (lambda m: rx.save("never made", m), "Cannot save"),
        (lambda m: rx.load("never opened", m), "Cannot load"),
        (lambda m: rx.count(m, "params"), "Cannot select by rx.collection"),
        (lambda m: rx.Optimizer(m, optax.sgd(0.1)), "Cannot train the model"),
        (lambda m: rx.update_refs(m, m), "Cannot update refs"),
        (lambda m: rx.filter_spec(m, "params"), "Cannot select by rx.collection"),
        (lambda m: rx.filter_spec(m, ~rx.collection("params")), "Cannot select by"),
        (lambda m: rx.filter_spec(m, rx.path("scale") & "params"), "Cannot select by"),
        (lambda m: rx.partition(m, rx.path("scale"), "params"), "Cannot select by"),
        (lambda m: rx.get_partition(m, rx.Ref), "Cannot select by Ref"),
        (lambda m: rx.mutable("params", m).__enter__(), "Cannot select by"),
        (lambda m: rx.filter_grad(jnp.sum, wrt="params")(m), "Cannot select by"),
    ],
)
@pytest.mark.parametrize("cls", [Norm, Plain])
def test_what_asks_for_refs(door, failure, cls):
    module = cls(jnp.ones(3), jnp.zeros(3))
    text = TEXT.format(f"{cls.__name__}.scale", "params")
    with raises(rx.RefTypeError, match=f"{failure}.*: {text}"):
        door({"norm": both_replaced(module)})
    module = eqx.tree_at(lambda m: m.scale, module, 2 * jnp.ones(3))
    text = TEXT.format(rf"{cls.__name__}.scale` at `f\.args\.0\.scale", "params")
    with raises(rx.RefTypeError, match=f"{failure}.*: {text}"):
        door({"f": functools.partial(reads, module)})


def test_numpy_arrays_and_numbers_are_found_too():
    for value in (np.zeros(3, np.float32), 1.5, True):
        made = eqx.tree_at(lambda m: m.mean, norm(), value)
        with raises(rx.RefTypeError, match=r"`Norm\.mean` at `mean` is declared"):
            rx.state_dict(made)


def test_what_jax_puts_there_is_legal():
    module = norm()
    for leaf in (
        None,
        object(),
        True,
        0,
        "spec",
        jax.ShapeDtypeStruct((3,), jnp.float32),
    ):
        other = jax.tree.map(lambda _: leaf, module)
        assert other.mean is leaf and other.scale is leaf
        one = eqx.tree_at(lambda m: m.mean, module, leaf)
        assert one.mean is leaf and isinstance(one.scale, rx.Ref)


def test_snapshots_and_gradients_are_legal():
    plain = rx.snapshot(norm())
    doubled = jax.tree.map(lambda x: 2 * x, plain)
    assert isinstance(doubled.mean, jax.Array) and doubled.scale[0] == 2.0
    loss = lambda m: jnp.sum(m.scale * 3.0 + m.mean)
    for grad in (jax.grad, eqx.filter_grad, rx.filter_grad):
        grads = grad(loss)(plain)
        assert grads.scale[0] == 3.0 and grads.mean[0] == 1.0
    assert rx.filter_jit(loss)(plain) == 9.0
    assert (
        rx.filter_grad(lambda m: jnp.sum(m.scale.value))(norm()).scale.value[0] == 1.0
    )
    assert rx.filter_spec(plain, eqx.is_array).mean is True


# What a function does with such a field, under a lifted transform.


def reads(module, x):
    return jnp.sum(x * module.scale.value)


def reads_either(module, x):
    return jnp.sum(x * module.scale[...])


def writes(module, x):
    module.mean.value = x


def writes_at(module, x):
    module.mean[...] = x


def notes_of(error):
    """Ours: JAX adds one that its frames are removed."""
    notes = [" ".join(note.split()) for note in error.__notes__]
    return [note for note in notes if "declared refs" in note]


LIFTED = [rx.filter_jit, rx.filter_grad, rx.filter_vmap, rx.filter_checkpoint]


@pytest.mark.parametrize("cls", [Norm, Plain])
@pytest.mark.parametrize("lifted", LIFTED)
def test_a_read_as_of_a_ref_is_explained(cls, lifted):
    plain = rx.snapshot(cls(jnp.ones(3), jnp.zeros(3)))
    with pytest.raises(AttributeError, match="has no attribute '?value") as info:
        lifted(reads)(plain, jnp.ones(3))
    (note,) = notes_of(info.value)
    assert f"a snapshot has: `{cls.__name__}.scale`." in note
    assert "use `self.scale[...]`, which works for refs and arrays" in note
    # The remedies.
    lifted(reads_either)(plain, jnp.ones(3))
    mended = repaired(info.value, plain, jnp.ones(3))
    rx.filter_jit(reads)(mended, jnp.ones(3))


@pytest.mark.parametrize("lifted", [rx.filter_jit, rx.filter_vmap])
@pytest.mark.parametrize("write", [writes, writes_at])
def test_a_write_as_to_a_ref_is_explained(lifted, write):
    plain = eqx.tree_at(lambda m: m.scale, rx.snapshot(norm()), None)
    with pytest.raises((AttributeError, TypeError)) as info:
        lifted(write)(plain, jnp.ones(3))
    (note,) = notes_of(info.value)
    assert "declared refs, as a snapshot has: `Norm.mean`." in note
    # The remedy.
    mended = repaired(info.value, plain, jnp.zeros(3))
    rx.filter_jit(write)(mended, jnp.ones(3))
    assert mended.mean[0] == 1.0


def test_it_is_explained_once_and_in_closures():
    plain = rx.snapshot(norm())

    @rx.filter_grad
    @rx.filter_jit
    def loss(x):
        return reads(plain, x)

    with pytest.raises(AttributeError) as info:
        loss(jnp.ones(3))
    assert len(notes_of(info.value)) == 1


def test_all_fields_that_may_be_meant_are_named():
    layers = rx.snapshot(Layers([jnp.ones(1)] * 6))

    def write(layers):
        layers.weights[5].value = jnp.zeros(1)

    with pytest.raises(AttributeError) as info:
        rx.filter_jit(write)(layers)
    assert "`Layers.weights[3]`, 2 more. To read" in notes_of(info.value)[0]


@pytest.mark.parametrize(
    "fails",
    [
        lambda m: m.missing,
        lambda m: jnp.zeros(3).missing,  # type: ignore[attr-defined]
        lambda m: object().value,  # type: ignore[attr-defined]
        lambda m: 1 + "1",  # type: ignore[operator]
    ],
)
def test_another_error_is_not_explained(fails):
    with pytest.raises((AttributeError, TypeError)) as info:
        rx.filter_jit(fails)(rx.snapshot(norm()))
    assert not notes_of(info.value)
