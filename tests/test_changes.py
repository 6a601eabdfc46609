"""What a function changes in place in its arguments: copies, state, and what is consumed."""

# A static checker objects to what is wrong on purpose here, or made at run time.
# pyright: reportArgumentType=false

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Float
from raising import raises

import refx_eqx as rx


ONE = jnp.array(1.0)
XS = jnp.arange(3.0)


def double(tree):
    tree["n"] = tree["n"] * 2
    return tree


def loops():
    """Each: what ours gives, and what JAX or Equinox gives, for a dict that is changed in
    place and returned."""

    def step(c, x):
        c["n"] = c["n"] + x
        c.setdefault("log", x)
        return c, c["n"]

    def body(i, c):
        return double(c)

    def test(c):
        return c["n"] < 10

    both = [
        ("scan", lambda t, c: t.scan(step, c, XS), (rx, jax.lax)),
        ("while_loop", lambda t, c: t.while_loop(test, double, c), (rx, jax.lax)),
        ("fori_loop", lambda t, c: t.fori_loop(0, 3, body, c), (rx, jax.lax)),
        ("cond", lambda t, c: t.cond(True, double, double, c), (rx, jax.lax)),
        ("switch", lambda t, c: t.switch(1, [double, double], c), (rx, jax.lax)),
        ("filter_jit", lambda t, c: t.filter_jit(double)(c), (rx, eqx)),
        ("filter_vmap", lambda t, c: t.filter_vmap(double)(stack(c)), (rx, eqx)),
        ("filter_checkpoint", lambda t, c: t.filter_checkpoint(double)(c), (rx, eqx)),
    ]
    return [pytest.param(run, libraries, id=name) for name, run, libraries in both]


def stack(tree):
    return jax.tree.map(lambda x: jnp.stack([x, x]), tree)


@pytest.mark.parametrize("run, libraries", loops())
def test_a_dict_changed_in_place_and_returned(run, libraries):
    ours, theirs = libraries
    carry = {"log": jnp.array(0.0), "n": ONE}
    assert eqx.tree_equal(run(ours, carry), run(theirs, carry))
    assert carry["n"] is ONE


def test_a_step_that_adds_an_entry_in_place_is_refused():
    def step(carry, x):
        carry["m"] = x
        return carry, None

    with raises(rx.StructureError, match="a step must return a carry of the structure"):
        rx.scan(step, {"n": ONE}, XS)


def test_a_batch_is_a_copy():
    weight = rx.Ref(jnp.array(2.0), "params")
    batch = {"x": jnp.array(3.0), "labels": jnp.array(5.0)}

    def loss(weight, batch):
        labels = batch.pop("labels")
        batch["x"] = batch["x"] / 2
        return weight.value * batch["x"] - labels

    for grad in (rx.filter_grad(loss), rx.filter_jit(rx.filter_grad(loss))):
        assert grad(weight, batch).value == 1.5
    assert list(batch) == ["x", "labels"] and batch["x"] == 3.0


def test_a_ref_must_stay_in_a_container_that_is_changed():
    tree = {"a": rx.Ref(ONE), "n": ONE}

    def rename(tree):
        tree["b"] = tree.pop("a")
        return tree["b"].value

    def drop(tree):
        del tree["a"]

    def add(tree):
        tree["list"] = [rx.Ref(ONE)]

    for change in (drop, add):
        with raises(
            rx.StructureError,
            match=r"the function changed argument 0 in place .*`dict\(...\)`",
        ):
            rx.filter_jit(change)(tree)
    assert rx.filter_jit(rename)(tree) == 1.0
    assert list(tree) == ["a", "n"]
    assert rx.filter_jit(lambda tree: drop(dict(tree)))(tree) is None  # the remedy


def test_a_container_that_is_returned_is_carried_by_the_result():
    refs = [rx.Ref(ONE)]

    @rx.filter_jit
    def append(refs):
        refs.append(rx.Ref(refs[0].value * 2))
        return {"refs": refs}

    out = append(refs)["refs"]
    assert out[0] is refs[0] and out[1].value == 2.0 and len(refs) == 1


class Model(eqx.Module):
    history: list
    weight: rx.Ref


def test_a_list_in_a_module_is_state():
    model = Model([ONE], rx.Ref(ONE))

    def append(model):
        model.history.append(ONE)

    with raises(rx.StructureError, match=r"changed argument 0 at `history` in place"):
        rx.filter_jit(append)(model)

    @rx.filter_jit
    def append_and_return(model):
        append(model)
        return model

    assert len(append_and_return(model).history) == 2 and len(model.history) == 1


def test_a_value_changed_in_place_is_held_to_its_type():
    class Cache(rx.Module):
        items: rx.Ref[dict[str, jax.Array]]

    cache = Cache({"a": ONE})

    @rx.filter_jit
    def set_item(cache, x):
        cache.items.value["b"] = x

    set_item(cache, ONE)
    assert list(cache.items.value) == ["a", "b"]
    with raises(rx.RefTypeError, match=r"Cache.items"):
        set_item(cache, "no")
    assert cache.items.value["b"] == 1.0


@pytest.mark.parametrize("hint, at", [("3", "a"), ("n 3", "a"), ("n", "b")])
def test_a_value_changed_in_place_is_held_to_its_shape(hint, at):
    """The type is that of the value before, not of what was put there."""

    class Cache(rx.Module):
        items: rx.Ref[dict[str, Float[jax.Array, hint]]]

    shape = (2, 3) if hint == "n 3" else (3,)
    cache = Cache({"a": jnp.ones(shape), "b": jnp.ones(shape)})

    @rx.filter_jit
    def set_item(cache, x):
        cache.items.value[at] = x

    set_item(cache, 2 * jnp.ones(shape))
    assert (cache.items.value[at] == 2.0).all()
    with raises(rx.RefTypeError, match=r"Cache.items.*cannot hold"):
        set_item(cache, jnp.ones((*shape[:-1], 4)))
    assert (cache.items.value[at] == 2.0).all()


# Equinox's own state.


class Net(eqx.Module):
    linear: eqx.nn.SpectralNorm
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        linear = eqx.nn.Linear(3, 3, key=key)
        self.linear = eqx.nn.SpectralNorm(linear, "weight", key=key)
        self.norm = eqx.nn.BatchNorm(3, "batch", mode="batch")

    def __call__(self, x, state):
        x, state = self.linear(x, state)
        return self.norm(x, state)


def make_net():
    return eqx.nn.make_with_state(Net)(jax.random.key(0))


BATCH = jnp.arange(12.0).reshape(4, 3) / 10


def forward(net, state, batch):
    run = jax.vmap(net, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return run(batch, state)


def loss(net, state, batch):
    out, state = forward(net, state, batch)
    return jnp.sum(out**3), state


def test_a_state_is_consumed_under_jit():
    net, state = make_net()
    expected = eqx.filter_jit(forward)(net, state, BATCH)
    lifted = rx.filter_jit(forward)
    for _ in range(3):  # the third by a plan
        assert eqx.tree_equal(lifted(net, state, BATCH), expected)
    # And by keyword, in a container, twice.
    twice = rx.filter_jit(
        lambda *, a: forward(net, forward(net, a[0], BATCH)[1], BATCH)
    )
    eager = eqx.filter_jit(lambda a: forward(net, forward(net, a[0], BATCH)[1], BATCH))
    assert eqx.tree_equal(twice(a=[state]), eager([state]))


def test_a_state_is_auxiliary_to_a_gradient():
    net, state = make_net()
    theirs = eqx.filter_value_and_grad(loss, has_aux=True)(net, state, BATCH)
    ours = rx.filter_value_and_grad(loss, has_aux=True)(net, state, BATCH)
    assert eqx.tree_equal(ours, theirs)
    ours = rx.filter_jit(rx.filter_grad(loss, has_aux=True))(net, state, BATCH)
    theirs = eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))(net, state, BATCH)
    assert eqx.tree_equal(ours, theirs)


def test_a_state_under_vmap():
    net, state = make_net()
    batches = jnp.stack([BATCH, BATCH + 1])
    axes = {"in_axes": (None, None, 0)}
    ours = rx.filter_vmap(forward, **axes)(net, state, batches)
    assert eqx.tree_equal(ours, eqx.filter_vmap(forward, **axes)(net, state, batches))
    inner = rx.filter_vmap(
        net, in_axes=(0, None), out_axes=(0, None), axis_name="batch"
    )
    assert eqx.tree_equal(inner(BATCH, state), forward(net, state, BATCH))


def test_a_state_is_the_carry_of_a_loop():
    net, state = make_net()
    arrays, rest = eqx.partition(net, eqx.is_array)
    batches = jnp.stack([BATCH, BATCH + 1])

    def step(state, batch):
        out, state = forward(eqx.combine(arrays, rest), state, batch)
        return state, out

    ours = rx.scan(step, state, batches)
    assert eqx.tree_equal(ours, jax.lax.scan(step, state, batches))

    def again(i, state):
        return step(state, BATCH)[0]

    ours = rx.fori_loop(0, 2, again, state)
    assert eqx.tree_equal(ours, jax.lax.fori_loop(0, 2, again, state))


def test_a_state_in_a_checkpointed_function():
    net, state = make_net()
    ours = rx.filter_jit(rx.filter_checkpoint(forward))(net, state, BATCH)
    theirs = eqx.filter_jit(eqx.filter_checkpoint(forward))(net, state, BATCH)
    assert eqx.tree_equal(ours, theirs)


def test_a_state_is_kept_in_a_ref():
    net, state = make_net()
    ref = rx.Ref(state, "batch_stats")

    @rx.filter_jit
    def step(net, ref, batch):
        out, ref.value = forward(net, ref.value, batch)
        return out

    expected = state
    for k in range(3):
        out, expected = eqx.filter_jit(forward)(net, expected, BATCH + k)
        assert eqx.tree_equal(step(net, ref, BATCH + k), out)
        assert eqx.tree_equal(ref.value, expected)

    # Read and consumed, but not written: the caller's stays.
    rx.filter_jit(lambda net, ref: forward(net, ref.value, BATCH)[0])(net, ref)
    assert eqx.tree_equal(ref.value, expected)


class Stateful(rx.Module):
    net: Net
    state: rx.Ref[eqx.nn.State] = rx.field(collection="batch_stats")

    def __call__(self, batch):
        out, self.state.value = forward(self.net, self.state.value, batch)
        return out


def test_a_declared_ref_is_written_with_a_new_state():
    net, state = make_net()
    model = Stateful(net, state)
    theirs = eqx.filter_grad(loss, has_aux=True)(net, model.state.value, BATCH)
    grads = rx.filter_grad(
        lambda model, batch: jnp.sum(model(batch) ** 3),
        wrt=~rx.collection("batch_stats"),
    )(model, BATCH)
    assert eqx.tree_equal(grads.net, theirs[0])
    assert eqx.tree_equal(model.state.value, theirs[1])


def test_functionalize_takes_a_state():
    net, state = make_net()
    out, updates = rx.functionalize(forward)(net, state, BATCH)
    assert eqx.tree_equal(out, forward(net, state, BATCH))
    assert jax.tree.leaves(updates) == []


@pytest.mark.parametrize("transform", [rx.filter_jit, rx.filter_checkpoint])
def test_a_key_that_is_renamed_in_the_value_of_a_ref(transform):
    def rename(ref):
        ref.value["b"] = ref.value.pop("a")

    ref = rx.Ref({"a": ONE})
    transform(rename)(ref)
    assert ref.value == {"b": 1.0}
