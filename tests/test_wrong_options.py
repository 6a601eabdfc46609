"""Options of another type than a function takes: the error names the function and the option."""

# A static checker objects to what is wrong on purpose here.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOptionalSubscript=false

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import pytest
from raising import raises

import refx_eqx as rx


def make():
    return rx.nn.Linear(2, 2, key=jr.key(0))


X = jnp.ones(2)
WRONG: dict[str, tuple[Any, str]] = {
    "axes": (
        lambda net, _: rx.axes(params=True),
        r"`rx.axes\({'params': True}\)`: an axis must be an int, or `None`",
    ),
    "load_state_dict": (
        lambda net, _: rx.load_state_dict(net, rx.state_dict(net), strict="no"),
        "`rx.load_state_dict`: `strict` must be `True` or `False`, but is 'no'",
    ),
    "rename": (
        lambda net, path: rx.load(path, net, rename=["weight"]),
        r"`rx.load`: `rename` must be a mapping from name to name, or a function, but is \[",
    ),
    "rename to a number": (
        lambda net, path: rx.load(path, net, rename=lambda name: 3),
        "`rx.load`: `rename` must give a name or `None`, but for 'weight' it gives 3",
    ),
    "rename by a mapping to a number": (
        lambda net, path: rx.load(path, net, rename={"weight": 3}),
        "`rx.load`: `rename` must give a name or `None`, but for 'weight' it gives 3",
    ),
    "param_labels": (
        lambda net, _: rx.param_labels(net, ["slow"]),
        r"`rx.param_labels` was given filters=\['slow'\]: give a mapping from label to",
    ),
    "capture": (
        lambda net, _: rx.capture(net, add=[1.0])(X),
        r"`rx.capture`: `add` must be a dict like the one that is returned, but is \[1.0\]",
    ),
    "size": (
        lambda net, _: rx.add_axis(net, "3"),
        "`rx.add_axis`: `size` must be an integer .* but is '3'",
    ),
    "negative size": (
        lambda net, _: rx.add_axis(net, -1),
        "`rx.add_axis`: `size` must be at least 0, but is -1",
    ),
    "axis": (
        lambda net, _: rx.add_axis(net, 3, axis=0.0),
        "`rx.add_axis`: `axis` must be an integer .* but is 0.0",
    ),
    "decay": (
        lambda net, _: rx.nn.EMA(net, "slow"),
        "`rx.nn.EMA`: `decay` must be a real number or an array of such, but was 'slow'",
    ),
    "rank": (
        lambda net, _: rx.nn.LoRA(net, 1.5, key=jr.key(0)),
        "`rx.nn.LoRA`: `rank` must be an integer .* but is 1.5",
    ),
    "axis of a norm": (
        lambda net, _: rx.nn.WeightNorm(net, axis=5),
        r"`rx.nn.WeightNorm`: `axis` is 5, but `weight` has shape \(2, 2\). Pass one of its",
    ),
    "axis of a norm by name": (
        lambda net, _: rx.nn.WeightNorm(net, axis="0"),
        "`rx.nn.WeightNorm`: `axis` must be an integer .* but is '0'",
    ),
    "num_power_iterations": (
        lambda net, _: rx.nn.SpectralNorm(net, num_power_iterations=1.5, key=jr.key(0)),
        "`rx.nn.SpectralNorm`: `num_power_iterations` must be an integer .* but is 1.5",
    ),
    "a derefed tree": (
        lambda net, _: rx.nn.merge_lora(rx.deref(rx.nn.LoRA(net, 1, key=jr.key(0)))),
        "Cannot merge: .*derefed",
    ),
    "threshold": (
        lambda net, _: rx.nn.Accuracy("x"),
        "`rx.nn.Accuracy`: `threshold` must be a number, .* but was 'x'",
    ),
    "cache_size": (
        lambda net, _: rx.nn.MultiheadAttention(1, 2, cache_size=-1, key=jr.key(0)),
        "`rx.nn.MultiheadAttention`: `cache_size` must be at least 1, but is -1",
    ),
    "trees": (
        lambda net, _: rx.tree_equal(),
        "`rx.tree_equal` compares trees, but was given none",
    ),
    "branches": (
        lambda net, _: rx.switch(0, lambda: net(X)),
        "`switch`: `branches` must be a list or tuple of functions, but is <function",
    ),
    "predicate": (
        lambda net, _: rx.cond(None, lambda: net(X), lambda: X),
        "`cond`: the predicate must be a scalar, but is None",
    ),
    "condition": (
        lambda net, _: rx.while_loop(lambda x: 3.0 - x, lambda x: x + 1.0, 0.0),
        "must return a boolean scalar, but it returned weak_f32.*Compare",
    ),
}


@pytest.mark.parametrize("option", WRONG)
def test_an_option_of_another_type_is_refused_by_name(option, tmp_path):
    net, path = make(), tmp_path / "net.safetensors"
    rx.save(path, net)
    before = rx.state_dict(net)
    call, match = WRONG[option]
    with raises((TypeError, ValueError), match=match):
        call(net, path)
    assert rx.state_dict(net) == before


def test_the_same_options_of_the_right_type(tmp_path):
    net, path = make(), tmp_path / "net.safetensors"
    rx.save(path, net)
    before = rx.snapshot(net)
    rx.load(path, net, rename=lambda name: name)
    rx.load(path, net, rename={}, strict=False)
    assert rx.tree_equal(rx.snapshot(net), before)
    assert rx.add_axis(net, 0).bias[...].shape == (0, 2)
    assert rx.add_axis(net, jnp.array(3), axis=-1).bias[...].shape == (2, 3)
    assert rx.while_loop(lambda x: x < 3.0, lambda x: x + 1.0, 0.0) == 3.0
    assert rx.switch(1, (lambda: 0, lambda: 1)) == 1


@pytest.mark.parametrize(
    "seed", ["a", 1.5, jnp.ones(3), [0], jr.split(jr.key(0)), jr.split(jr.PRNGKey(0))]
)
def test_a_seed_is_an_int_or_a_key(seed):
    with raises(
        TypeError,
        match="`rx.Rngs`: the seed of the stream 'dropout' must be an int or one "
        "`jax.random` key, but is",
    ):
        rx.Rngs(0, dropout=seed)
    for right in (jr.key(0), jr.PRNGKey(0), jnp.array(0)):
        rx.Rngs(0, dropout=right).dropout()


def test_the_predicate_of_as_refs_does_not_write():
    ref = rx.Ref(X, "counts")

    def where(leaf):
        ref.value = X + 1
        return True

    with raises(
        rx.ImmutableError, match="this code runs in a filter, which only selects"
    ):
        rx.as_refs({"a": X}, where=where)
    assert ref.value.tolist() == X.tolist()


def test_a_dataclass_with_a_model_is_told_to_be_a_module():
    @dataclasses.dataclass
    class Holder:
        net: rx.nn.Linear

    class Module(eqx.Module):
        net: rx.nn.Linear

    @dataclasses.dataclass(frozen=True)
    class Config:
        scale: float

    step = rx.filter_jit(lambda holder, x: holder.net(x))
    with raises(
        TypeError,
        match="a Holder is not hashable. If there are arrays or refs in it, make it an "
        r"`equinox.Module`; otherwise make it hashable: `@dataclasses.dataclass\(frozen=True",
    ):
        step(Holder(make()), X)
    assert step(Module(make()), X).shape == (2,)
    assert rx.filter_jit(lambda c, x: c.scale * x)(Config(2.0), X).tolist() == [
        2.0,
        2.0,
    ]


def test_the_class_of_an_error_is_public():
    with raises(rx.MismatchError, match="`in_axes` must consist of") as caught:
        rx.filter_vmap(lambda x: x, in_axes="a")(X)
    assert type(caught.value).__name__ == "MismatchError"
