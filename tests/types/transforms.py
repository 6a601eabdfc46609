"""A lifted transform keeps parameters and results. Checked, never run."""

import functools
from typing import assert_type

import jax
from jaxtyping import Array

import refx_eqx as rx


class Linear(rx.Module):
    weight: rx.Param[Array]

    @rx.filter_jit
    def method(self, x: Array) -> Array:
        return self.weight[...] @ x

    @rx.filter_jit(donate="refs")
    def donating(self, x: Array, *, scale: float = 1.0) -> tuple[Array, int]:
        return self.weight[...] @ x * scale, 1


def loss(model: Linear, x: Array, *, scale: float = 1.0) -> Array:
    return model.method(x) * scale


def loss_and_aux(model: Linear, x: Array) -> tuple[Array, dict[str, int]]:
    return loss(model, x), {}


def jit(model: Linear, x: Array) -> None:
    assert_type(rx.filter_jit(loss)(model, x, scale=2.0), Array)
    assert_type(rx.filter_jit(loss, donate="all")(model, x), Array)
    assert_type(rx.filter_jit(donate="refs")(loss)(model, x), Array)
    assert_type(rx.filter_jit(Linear)(x), Linear)
    assert_type(model.method(x), Array)
    assert_type(model.donating(x, scale=2.0), tuple[Array, int])


@rx.filter_grad
def grad(model: Linear, x: Array) -> Array:
    return loss(model, x)


@rx.filter_grad(wrt="params")
def grad_of_params(model: Linear, x: Array) -> Array:
    return loss(model, x)


@rx.filter_grad(has_aux=True)
def grad_and_aux(model: Linear, x: Array) -> tuple[Array, dict[str, int]]:
    return loss_and_aux(model, x)


@rx.filter_value_and_grad(wrt=rx.collection("params"), has_aux=True)
def value_and_grad(model: Linear, x: Array) -> tuple[Array, dict[str, int]]:
    return loss_and_aux(model, x)


def gradients(model: Linear, x: Array) -> None:
    assert_type(rx.filter_grad(loss)(model, x, scale=2.0), Linear)
    assert_type(rx.filter_grad(loss, wrt="params")(model, x), Linear)
    assert_type(
        rx.filter_grad(loss_and_aux, has_aux=True)(model, x),
        tuple[Linear, dict[str, int]],
    )
    assert_type(grad(model, x), Linear)
    assert_type(grad_of_params(model, x), Linear)
    assert_type(grad_and_aux(model, x), tuple[Linear, dict[str, int]])
    assert_type(grad(model, x).weight.value, Array)
    assert_type(rx.filter_value_and_grad(loss)(model, x), tuple[Array, Linear])
    assert_type(value_and_grad(model, x), tuple[tuple[Array, dict[str, int]], Linear])


def gradient_of_two_models(a: Linear, b: Linear) -> None:
    def both(models: tuple[Linear, Linear]) -> Array:
        return models[0].weight.value

    assert_type(rx.filter_grad(both)((a, b)), tuple[Linear, Linear])


@rx.filter_vmap(in_axes=(rx.axes(params=None), 0))
def batched(model: Linear, x: Array) -> Array:
    return loss(model, x)


def vmap(model: Linear, x: Array) -> None:
    assert_type(rx.filter_vmap(loss)(model, x), Array)
    assert_type(rx.filter_vmap(loss, in_axes=(None, 0))(model, x), Array)
    assert_type(rx.filter_vmap(Linear)(x), Linear)
    assert_type(batched(model, x), Array)


def nested(model: Linear, x: Array) -> None:
    step = rx.filter_jit(rx.filter_value_and_grad(rx.filter_vmap(loss)))
    assert_type(step(model, x), tuple[Array, Linear])


def eval_shape(model: Linear, x: Array) -> None:
    assert_type(rx.filter_eval_shape(Linear, x), Linear)
    assert_type(rx.filter_eval_shape(loss, model, jax.eval_shape(abs, x)), Array)


@rx.lift(jax.checkpoint)
def lifted(model: Linear, x: Array) -> Array:
    return loss(model, x)


def lift(model: Linear, x: Array) -> None:
    assert_type(lifted(model, x), Array)
    checkpoint = functools.partial(rx.lift(jax.checkpoint), prevent_cse=False)
    assert_type(checkpoint(loss)(model, x), Array)
    assert_type(rx.lift(jax.checkpoint)(loss, policy=None)(model, x), Array)


def step(carry: Array, x: Array) -> tuple[Array, dict[str, Array]]:
    return carry + x, {"x": x}


def control_flow(x: Array) -> None:
    assert_type(rx.scan(step, x, x), tuple[Array, dict[str, Array]])
    assert_type(rx.map(lambda x: {"x": step(x, x)[0]}, x), dict[str, Array])
    assert_type(rx.cond(True, step, step, x, x), tuple[Array, dict[str, Array]])
    assert_type(rx.switch(0, [step, step], x, x), tuple[Array, dict[str, Array]])
    assert_type(rx.while_loop(lambda x: x < 3, lambda x: x + 1, x), Array)
    assert_type(rx.fori_loop(0, 3, lambda i, x: step(x, x)[0], x), Array)


@rx.filter_custom_jvp
def with_rule(model: Linear, *, scale: float = 1.0) -> Array:
    return model.weight[...] * scale


def derivatives(model: Linear, x: Array) -> None:
    assert_type(rx.filter_jvp(loss, (model, x), (None, x)), tuple[Array, Array])
    out, pullback = rx.filter_vjp(loss, model, x)
    assert_type(out, Array)
    pullback(x)
    _, pushforward, aux = rx.filter_linearize(loss_and_aux, model, x, has_aux=True)
    assert_type(pushforward(None, x), Array)
    assert_type(aux, dict[str, int])
    assert_type(with_rule(model, scale=2.0), Array)
    assert_type(rx.filter_grad(with_rule)(model, scale=2.0), Linear)
    converted = rx.filter_closure_convert(loss, model, jax.eval_shape(abs, x))
    assert_type(converted(model, x), Array)


def functionalize(model: Linear, x: Array) -> None:
    _out, updates = rx.functionalize(loss)(rx.deref(model), x)
    rx.update_refs((model, x), updates)
