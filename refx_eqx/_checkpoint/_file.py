"""Named arrays in one safetensors file: written whole or not at all, read without trust.

    8 bytes: the length of the header | the header, in JSON | the arrays, one after another

The header has the name, dtype, shape and place of each array, and, under `"__metadata__"`,
any text of the writer. Nothing in such a file is ever executed.
"""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._core._errors import CheckpointError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


METADATA = "__metadata__"
"""The one name that an array cannot have."""

_CODES = {
    "bool": "BOOL",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2": "F8_E5M2",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
}
_DTYPES = {code: jnp.dtype(name) for name, code in _CODES.items()}


def has_dtype(dtype: np.dtype) -> bool:
    """Whether the format supports a dtype. Its numbers are little-endian."""
    return dtype.name in _CODES and dtype == dtype.newbyteorder("<")


class Stored(NamedTuple):
    """An array to write. Arrays are brought to the host one at a time."""

    array: Any
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


def write(
    path: str | os.PathLike, arrays: Mapping[str, Stored], metadata: dict[str, str]
) -> None:
    """Writes a file of these arrays to `path`, replacing any existing file.

    `safetensors.numpy.save_file` needs all arrays on the host at once, and does not flush.
    """
    # Wide dtypes first, so that each array is aligned in the file.
    order = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    header: dict[str, Any] = {METADATA: metadata}
    end = 0
    for name in order:
        start, end = end, end + arrays[name].nbytes
        header[name] = {
            "dtype": _CODES[arrays[name].dtype.name],
            "shape": arrays[name].shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _replacing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            array = np.ascontiguousarray(arrays[name].array, arrays[name].dtype)
            file.write(array.reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def _replacing(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """A new file, which replaces `path` in one step when the context ends without an error.

    Whenever the process is killed, the file at `path` is complete: the old one or the new
    one.
    """
    target = Path(path).resolve()  # the file itself, if `path` is a link to it
    _remove_leftovers(target)
    file = _open_beside(target)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file.name)
        raise
    _flush_folder(target.parent)


def _open_beside(target: Path) -> BinaryIO:
    while True:
        name = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        file = open(name, "xb")  # noqa: SIM115
        if fcntl is None:
            return file
        fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # another process took it for a leftover, before the lock


def _remove_leftovers(target: Path) -> None:
    """Removes leftover files of killed processes, which no process locks."""
    if fcntl is None:
        return
    for leftover in target.parent.glob("*.tmp"):
        if leftover.name.startswith(f".{target.name}."):
            with contextlib.suppress(OSError), open(leftover, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()


def _flush_folder(folder: Path) -> None:
    """Makes a new name in a folder survive a power loss."""
    if fcntl is not None:  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class TensorFile:
    """A file to read from. Made by `opened`."""

    def __init__(self, file: BinaryIO, header: dict[str, Any], start: int):
        self._file = file
        self._start = start
        self.metadata: dict[str, str] = header.pop(METADATA, None) or {}
        self._entries = header
        self.names = tuple(header)

    def __getitem__(self, name: str) -> np.ndarray:
        entry = self._entries[name]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(
                f"Cannot load {self._file.name}: {name!r} in it has dtype "
                f"{entry['dtype']}, which NumPy does not have. Convert the file, or leave "
                "the name out: `rename={" + f"{name!r}: None" + "}`."
            )
        begin, end = entry["data_offsets"]
        self._file.seek(self._start + begin)
        data = self._file.read(end - begin)
        # A writable copy.
        return np.frombuffer(data, dtype).reshape(entry["shape"]).copy()


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[TensorFile]:
    """Opens the file at `path`, after checking its header against its length."""
    library = safetensors()
    with open(path, "rb") as file:
        try:
            # The library checks the header; after that it can be trusted here.
            with library.safe_open(path, "numpy"):
                pass
        except library.SafetensorError as e:
            raise CheckpointError(
                f"Cannot load {os.fspath(path)}: it is not a complete safetensors file "
                f"({e}). If it was truncated, load an earlier one. If it has another "
                "format, read it with the library that wrote it, and give the arrays to "
                "`rx.load_state_dict`."
            ) from None
        length = int.from_bytes(file.read(8), "little")
        yield TensorFile(file, json.loads(file.read(length)), 8 + length)


def safetensors() -> Any:
    """The safetensors library, an optional dependency."""
    try:
        import safetensors
    except ImportError:
        raise ImportError(
            "`rx.save` and `rx.load` need the package `safetensors`: "
            "`pip install 'refx_eqx[checkpoint]'`."
        ) from None
    return safetensors
