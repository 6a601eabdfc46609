"""What a type checker must refuse. `# E: rule | code`: of pyright and of mypy."""

# ruff: noqa: B018 (an attribute that is missing is the point)

import jax
from jaxtyping import Array

import refx_eqx as rx


class Linear(rx.Module):
    weight: rx.Param[Array]

    @rx.filter_jit
    def method(self, x: Array) -> Array:
        return self.weight[...] @ x


def loss(model: Linear, x: Array, *, scale: float = 1.0) -> Array:
    return model.method(x) * scale


def jit(model: Linear, x: Array) -> None:
    jitted = rx.filter_jit(loss)
    jitted(model)  # E: reportCallIssue | call-arg
    jitted(model, x, scale="no")  # E: reportArgumentType | arg-type
    rx.filter_jit(donate="refs")(loss)("no", x)  # E: reportArgumentType | arg-type
    model.method()  # E: reportCallIssue | call-arg
    donate = "some"
    rx.filter_jit(  # E: - | call-overload
        loss,
        donate=donate,  # E: reportArgumentType | -
    )


@rx.filter_grad(wrt="params")
def grad(model: Linear, x: Array) -> Array:
    return loss(model, x)


def gradients(model: Linear, x: Array) -> None:
    grad("no", x)  # E: reportArgumentType | arg-type
    grad(model)  # E: reportCallIssue | call-arg
    # The first argument is differentiated, and must be passed by position.
    grad(model=model, x=x)  # E: reportCallIssue | call-arg
    grad(model, x).bias  # E: reportAttributeAccessIssue | attr-defined
    pair = rx.filter_value_and_grad(loss)(model, x)
    pair.weight  # E: reportAttributeAccessIssue | attr-defined
    # With `has_aux` the function must return a pair.
    rx.filter_grad(  # E: reportCallIssue | call-overload
        loss,
        has_aux=True,  # E: reportArgumentType | -
    )


def others(model: Linear, x: Array) -> None:
    rx.filter_vmap(loss)(model)  # E: reportCallIssue | call-arg
    rx.filter_vmap(loss, 0)  # E: reportCallIssue | call-overload
    rx.filter_eval_shape(Linear, x).method("no")  # E: reportArgumentType | arg-type
    rx.lift(jax.checkpoint)(loss)("no", x)  # E: reportArgumentType | arg-type
    params, _ = rx.partition(model, "params")
    params.bias  # E: reportAttributeAccessIssue | attr-defined
    rx.deref(model).bias  # E: reportAttributeAccessIssue | attr-defined
