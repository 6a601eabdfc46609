"""`Module`: an `equinox.Module` in which an annotation is enough to make a ref."""

import copyreg
import dataclasses
from typing import Any, dataclass_transform, TYPE_CHECKING

import equinox as eqx

from ._axis_names import bind_in_methods
from ._config import config
from ._construction import ModuleMeta
from ._field import field, RefField
from ._instance import check_instance, names_of_instance
from ._misplaced import check_field, MAY_HOLD_ARRAYS
from ._module_fields import declare_ref_fields


if TYPE_CHECKING:
    from equinox._module._module import _ModuleMeta as _EquinoxMeta

    # Type checkers ask the metaclass for field specifiers, and Equinox's only knows its
    # own.
    @dataclass_transform(field_specifiers=(dataclasses.field, eqx.field, field))
    class _ModuleMeta(_EquinoxMeta): ...

else:
    _ModuleMeta = ModuleMeta


class Module(eqx.Module, metaclass=_ModuleMeta):
    """An `equinox.Module` whose fields may hold refs. Every function of Equinox works on
    it, because a ref is a leaf.

    A field annotated as a ref (`rx.Param[...]`, `rx.Ref[...]`, or a collection of your own)
    wraps the values assigned to it. Assigning a value makes a new ref in the field's
    collection; assigning a ref shares it. `self.weight` is the ref inside `__init__` too.

    !!! Example

        ```python
        import jax.numpy as jnp
        import jax.random as jr
        import refx_eqx as rx
        from jaxtyping import Array, Float, Int

        class Linear(rx.Module):
            weight: rx.Param[Float[Array, "out in"]]
            bias: rx.Param[Float[Array, "out"]] | None
            uses: rx.Ref[Int[Array, ""]] = rx.field(collection="counts")

            def __init__(self, n_in, n_out, *, key):
                self.weight = jr.normal(key, (n_out, n_in))
                self.bias = None
                self.uses = jnp.array(0)

            def __call__(self, x):
                self.uses.value += 1
                return self.weight[...] @ x

        linear = Linear(3, 2, key=jr.key(0))
        assert linear(jnp.ones(3)).shape == (2,)
        assert linear.uses.value == 1
        assert linear.weight.name == "Linear.weight"
        ```

    After `__init__` a module is frozen, as in Equinox. To change a value, write to its
    ref; to change which ref a field holds, use `equinox.tree_at`.

    **Raises:**

    When it is made:

    - `RefTypeError`: if a field is given a value of another type than declared.
    - `CollectionError`: if a field is given a ref of another collection.
    - `NameError`: if an annotation is a type alias that uses a name which is still not
        defined, so it is not known whether it stands for a ref.

    When its class is made, or the first instance:

    - `CollectionError`: if an annotation does not give exactly one collection to one ref.
    - `ValueError`: if a static field is annotated as a ref.
    - `TypeError`: if an annotation puts refs into something that is not a pytree, such as a
        set; or if the default of a field is a ref, or holds one.

    And `dataclasses.FrozenInstanceError`: if a field is assigned after `__init__`.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        declare_ref_fields(cls)

    def __check_init__(self) -> None:
        # Equinox's hook for invariants of an instance, called after `__init__`.
        if config.check_types:
            check_instance(self)

    if not TYPE_CHECKING:

        def __reduce_ex__(self, protocol: Any) -> Any:
            # Equinox (0.13) has each module that its `__new__` made in a list, which the end
            # of `__init__` takes it off: a copy would stay there, alive and not frozen.
            reduced = super().__reduce_ex__(protocol)
            if reduced[0] is copyreg.__newobj__:
                reduced = _without_init, *reduced[1:]
            return reduced

        def __getattribute__(self, name: str) -> Any:
            out = super().__getattribute__(name)
            if isinstance(out, MAY_HOLD_ARRAYS):
                check_field(self, name, out)
            return out

        def __setattr__(self, name: str, value: Any) -> None:
            field = type(self).__dataclass_fields__.get(name)
            if not isinstance(field, RefField) or field.declared is None:
                super().__setattr__(name, value)
                return
            try:
                # Before the conversion, which may give the ref a name and a collection: a
                # frozen module must not change it.
                super().__setattr__(name, value)
            except dataclasses.FrozenInstanceError:
                raise dataclasses.FrozenInstanceError(
                    f"cannot assign to field '{name}': a module is frozen after its "
                    f"`__init__`. To change the value of the ref, write `.{name}.value = "
                    f"...`; to put another ref there, use `eqx.tree_at(lambda m: m.{name}, "
                    "module, ref)`, which makes a new module."
                ) from None
            super().__setattr__(name, field.convert(value, type(self).__name__))


def _without_init(cls: type) -> Any:
    return object.__new__(cls)


bind_in_methods(Module, names_of_instance)
