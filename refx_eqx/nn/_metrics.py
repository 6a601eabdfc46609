"""Metrics accumulated over the batches of an epoch."""

from typing import Annotated, Any, TypeVar

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int

from .._core._ref import Ref
from .._fields._collection import Collection
from .._fields._module import Module


T = TypeVar("T")
_MetricRef = Annotated[Ref[T], Collection("metrics")]


class _Metric(Module):
    """A mean over all values added since the last reset."""

    mean: _MetricRef[Float[Array, ""]]
    count: _MetricRef[Int[Array, ""]]

    def __init__(self) -> None:
        self.mean = jnp.zeros(())
        self.count = jnp.array(0)

    def compute(self) -> Array:
        """The mean: a scalar. NaN if there are no values."""
        return jnp.where(self.count[...] == 0, jnp.nan, self.mean[...])

    def reset(self) -> None:
        """Forgets all values."""
        self.mean.value = jnp.zeros_like(self.mean[...])
        self.count.value = jnp.zeros_like(self.count[...])

    def _add(self, values: Array, mask: Any) -> None:
        values = values.astype(self.mean.dtype)
        mask = jnp.ones(values.shape, bool) if mask is None else jnp.asarray(mask)
        if mask.shape != values.shape:
            raise ValueError(
                f"`rx.nn.{type(self).__name__}`: the mask has shape {mask.shape}, but the "
                f"values have shape {values.shape}. Give one `bool` for each value."
            )
        count = self.count[...] + jnp.sum(mask, dtype=self.count.dtype)
        # A sum of all values would lose precision as it grows; the mean does not.
        gain = jnp.sum(jnp.where(mask, values - self.mean[...], 0))
        mean = self.mean[...] + gain / jnp.maximum(count, 1).astype(gain.dtype)
        self.mean.value, self.count.value = mean, count


class Average(_Metric):
    """The mean of all values since the last reset.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        loss = rx.nn.Average()

        @rx.filter_jit
        def step(loss, batch):
            loss.update(batch)  # inside a step, as any write

        for batch in jnp.arange(6.0).reshape(2, 3):
            step(loss, batch)
        assert loss.compute() == 2.5
        loss.reset()
        ```

    Its refs, of collection `"metrics"`, are the mean so far and the count of values.
    """

    def update(self, values: ArrayLike, *, mask: ArrayLike | None = None) -> None:
        """Adds values.

        **Arguments:**

        - `values`: a number, or an array of any shape.
        - `mask`: a `bool` array of that shape, with `False` for values to ignore.
        """
        self._add(jnp.asarray(values), mask)


class Accuracy(_Metric):
    """The fraction of correct predictions since the last reset.

    !!! Example

        ```python
        import jax.numpy as jnp
        import refx_eqx as rx

        accuracy = rx.nn.Accuracy()
        logits = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.1]])
        accuracy.update(logits, labels=jnp.array([0, 1, 1]))
        assert jnp.allclose(accuracy.compute(), 2 / 3)
        ```

    **Arguments:**

    - `threshold`: for binary classification: the prediction is one where the single logit
        is greater. By default the prediction is the class with the greatest logit.

    **Raises:**

    - `TypeError`: if `threshold` is not a number.
    """

    threshold: float | None

    def __init__(self, threshold: float | None = None):
        if not (threshold is None or eqx.is_array_like(threshold)):
            raise TypeError(
                "`rx.nn.Accuracy`: `threshold` must be a number, or `None` for the class with "
                f"the greatest logit, but was {threshold!r}."
            )
        super().__init__()
        self.threshold = threshold

    def update(
        self, logits: ArrayLike, labels: ArrayLike, *, mask: ArrayLike | None = None
    ) -> None:
        """Adds predictions.

        **Arguments:**

        - `logits`: of shape `(..., n_classes)`; with a `threshold`, of the shape of `labels`.
        - `labels`: integers: the numbers of the correct classes.
        - `mask`: a `bool` array with the shape of `labels`, with `False` for predictions to
            ignore.

        **Raises:**

        - `ValueError`: if the predictions do not have the shape of the labels.
        """
        labels = jnp.asarray(labels)
        if self.threshold is None:
            guesses = jnp.argmax(logits, axis=-1)
        else:
            guesses = jnp.asarray(logits) > self.threshold
        if guesses.shape != labels.shape:
            raise ValueError(
                f"`rx.nn.Accuracy`: the labels have shape {labels.shape}, but the "
                f"predictions have shape {guesses.shape}. Give logits of shape "
                "(*labels.shape, n_classes), or of the shape of the labels if there is a "
                "`threshold`."
            )
        self._add(guesses == labels.astype(guesses.dtype), mask)
