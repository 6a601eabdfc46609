"""`pytest.raises` for the messages of the library, whose lines break anywhere."""

import re

import pytest

import refx_eqx as rx


def message_of(error: BaseException) -> str:
    """The message, in one line if the library wraps it."""
    return error.args[0] if isinstance(error, rx.RefError) else str(error)


def raises(
    errors: type[BaseException] | tuple[type[BaseException], ...], *, match: str
) -> pytest.RaisesExc[BaseException]:
    """As `pytest.raises`, but `match` looks at `message_of` the error."""

    def has_match(error: BaseException) -> bool:
        assert re.search(match, message_of(error)), message_of(error)
        return True

    return pytest.raises(errors, check=has_match)
