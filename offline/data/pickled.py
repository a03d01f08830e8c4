"""Plain data out of a pickle: a reader of the stream's opcodes that imports, calls and executes nothing.

The revisited retrieval sets publish their ground truth as pickles. A pickle is a program, and running one from
elsewhere hands over the machine. Here an allow-list of opcodes makes None, bool, int, float, str, bytes, list, tuple,
dict and numeric numpy arrays. What numpy writes for an array are names and a buffer: the names are compared with those
known, as text, and nothing that a file names is ever looked up. Every other name, opcode and type ends the reading.

Strings of Python 2 are read as Latin-1, numpy's scalars as Python's numbers. Knows nothing of what the data means.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from offline.data.pickle_opcodes import WRONG, operations
from offline.errors import DataError, DataMissing

MAX_BYTES = 64 * 2**20
MAX_VALUES = 4_000_000
"""Opcodes of a stream, and values of the result, where one that is referred to twice counts twice."""
MAX_DEPTH = 100
MAX_PROTOCOL = 5

_RECONSTRUCT = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_FROM_BUFFER = ("numpy.core.numeric _frombuffer", "numpy._core.numeric _frombuffer")
_SCALAR = ("numpy.core.multiarray scalar", "numpy._core.multiarray scalar")
_ARRAY, _DTYPE = "numpy ndarray", "numpy dtype"
_ENCODE = "_codecs encode"  # how protocols 0 to 2 of Python 3 write bytes
_BYTES = ("__builtin__ bytes", "builtins bytes")  # and empty ones
_NAMES = frozenset((*_RECONSTRUCT, *_FROM_BUFFER, *_SCALAR, _ARRAY, _DTYPE, _ENCODE, *_BYTES))
_NUMBERS = frozenset(("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"))
_SCALARS = (bool, int, float, str, bytes)

_NUMBER_LITERALS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXT_LITERALS = ("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_LITERALS = frozenset((*_NUMBER_LITERALS, *_TEXT_LITERALS, "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickled(path: Path) -> Any:
    """Read a file of one pickled value; see `plain_data`.

    Raises:
        DataMissing: it is not there.
        DataError: it cannot be read, is larger than `MAX_BYTES`, or see `plain_data`.
    """
    if not path.is_file():
        raise DataMissing(path)
    try:
        with path.open("rb") as file:
            stream = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(str(path), f"cannot be read: {error}") from error
    return plain_data(stream, str(path))


def plain_data(stream: bytes, name: str = "pickle") -> Any:
    """The value of a pickle, of the protocols 0 to 5, as far as it is plain data.

    Args:
        stream: one whole pickle and nothing after it.
        name: in errors.

    Returns:
        A tree of None, bool, int, float, str, bytes, list, tuple, dict and read-only arrays of bool, int, uint or
        float. What the stream refers to more than once is there more than once.

    Raises:
        DataError: the stream is larger than `MAX_BYTES` or damaged; has more than `MAX_VALUES` opcodes or values, or
            is nested deeper than `MAX_DEPTH`, as one that contains itself is; or asks for anything but plain data,
            which the error names.
    """
    if len(stream) > MAX_BYTES:
        raise DataError(name, f"pickle is larger than {MAX_BYTES} bytes")
    try:
        return _Plain().of(_Machine().run(stream))
    except WRONG as error:
        raise DataError(name, f"is no pickle of plain data: {error}") from error


class _Pairs(list[tuple[Any, Any]]):
    """A dict in the making: keys are not hashed before they are known to be plain and small."""


class _Buffer(bytes):
    """What numpy's arrays may be made of, and plain data may not hold: a bytearray."""


class _Name(str):
    """A name that the stream asks to be imported, as 'MODULE NAME'; it is only ever compared."""

    __slots__ = ()


class _Dtype:
    """A dtype in the making."""

    def __init__(self, number: str) -> None:
        self.number, self.order = number, ""

    def build(self, state: Any) -> None:
        """Take in the byte order."""
        plain = isinstance(state, tuple) and len(state) == 8 and state[2:] == (None, None, None, -1, -1, 0)
        if not plain or state[1] not in ("<", ">", "|", "="):
            raise ValueError("a numpy dtype is not of plain numbers")
        self.order = state[1]

    @property
    def made(self) -> np.dtype[Any]:
        """The dtype."""
        if not self.order:
            raise ValueError("a numpy dtype has no byte order")
        return np.dtype(self.order + self.number)


class _Array:
    """An array in the making; `values` is None until its state is known."""

    def __init__(self) -> None:
        self.values: NDArray[Any] | None = None

    def build(self, state: Any) -> None:
        """Take in shape, dtype and buffer."""
        if not isinstance(state, tuple) or len(state) != 5:
            raise ValueError("a numpy array has an unknown state")
        _, shape, dtype, in_fortran_order, data = state
        self.fill(data, dtype, shape, "F" if in_fortran_order is True else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: Any) -> None:
        """View a buffer, which is not copied: the same one may be referred to many times."""
        self.values = _numbers(data, dtype, shape).reshape(shape, order=_one_of(order, "C", "F"))


def _numbers(data: Any, dtype: Any, shape: Any) -> NDArray[Any]:
    """The flat values of a buffer that holds exactly as many as a shape asks for."""
    if isinstance(data, str):  # of Python 2
        data = data.encode("latin-1")
    sizes = isinstance(shape, tuple) and len(shape) <= 8 and all(type(n) is int and n >= 0 for n in shape)
    if not isinstance(dtype, _Dtype) or not isinstance(data, bytes) or not sizes:
        raise ValueError("a numpy array is not of plain numbers")
    if math.prod(shape) * dtype.made.itemsize != len(data):
        raise ValueError(f"a numpy array has {len(data)} bytes, which do not fit its shape")
    return np.frombuffer(data, dtype.made) if data else np.zeros(0, dtype.made)


class _Machine:
    """The stack and the memo that a pickle's opcodes work on, without those that reach outside of them."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._encoded_bytes = 0
        self._by_name: dict[str, Callable[[], None]] = {
            "MARK": lambda: self._marks.append(len(self._stack)),
            "EMPTY_LIST": lambda: self._stack.append([]),
            "EMPTY_DICT": lambda: self._stack.append(_Pairs()),
            "LIST": lambda: self._stack.append(self._to_mark()),
            "TUPLE": lambda: self._stack.append(tuple(self._to_mark())),
            "DICT": lambda: self._stack.append(_Pairs(_paired(self._to_mark()))),
            "APPEND": lambda: self._extend([self._pop()]),
            "APPENDS": lambda: self._extend(self._to_mark()),
            "SETITEM": lambda: self._set(self._take(2)),
            "SETITEMS": lambda: self._set(self._to_mark()),
            "MEMOIZE": lambda: self._remember(len(self._memo)),
            "STACK_GLOBAL": lambda: self._name(" ".join(_texts(self._take(2)))),
            "REDUCE": self._reduce,
            "BUILD": self._build,
        }

    def run(self, stream: bytes) -> Any:
        """The one value that is left at the end."""
        for count, (position, operation, argument) in enumerate(operations(stream)):
            if count >= MAX_VALUES:
                raise ValueError(f"more than {MAX_VALUES} opcodes")
            try:
                self._step(operation, argument)
            except WRONG as error:
                raise ValueError(f"{operation} at byte {position}: {error}") from error
        if len(self._stack) != 1 or self._marks:
            raise ValueError(f"{len(self._stack)} values are left at its end, instead of one")
        return self._stack[0]

    def _step(self, operation: str, argument: Any) -> None:
        if operation in _LITERALS:
            self._stack.append(argument)
        elif operation in _CONSTANTS:
            self._stack.append(_CONSTANTS[operation])
        elif operation in _TUPLES:
            self._stack.append(tuple(self._take(_TUPLES[operation])))
        elif operation in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._remember(argument)
        elif operation in ("GET", "BINGET", "LONG_BINGET"):
            self._stack.append(self._recall(argument))
        elif operation in self._by_name:
            self._by_name[operation]()
        elif operation == "GLOBAL":
            self._name(argument)
        elif operation == "BYTEARRAY8":
            self._stack.append(_Buffer(argument))
        elif operation == "PROTO":
            if argument > MAX_PROTOCOL:
                raise ValueError(f"protocol {argument} is not known")
        elif operation not in ("FRAME", "STOP"):
            raise ValueError(f"asks for more than plain data{_asked(operation, argument)}")

    def _pop(self) -> Any:
        return self._take(1)[0]

    def _take(self, count: int) -> list[Any]:
        """The last values, which may not reach below the last mark."""
        start = len(self._stack) - count
        if start < (self._marks[-1] if self._marks else 0):
            raise ValueError("finds too few values")
        taken = self._stack[start:]
        del self._stack[start:]
        return taken

    def _to_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError("finds no mark")
        taken = self._take(len(self._stack) - self._marks[-1])
        self._marks.pop()
        return taken

    def _top(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("finds no value")
        return self._stack[-1]

    def _extend(self, values: list[Any]) -> None:
        if type(self._top()) is not list:
            raise ValueError("finds no list")
        self._top().extend(values)

    def _set(self, values: list[Any]) -> None:
        if type(self._top()) is not _Pairs:
            raise ValueError("finds no dict")
        self._top().extend(_paired(values))

    def _remember(self, place: int) -> None:
        self._memo[place] = self._top()

    def _recall(self, place: int) -> Any:
        if place not in self._memo:
            raise ValueError(f"refers to value {place}, which is not there")
        return self._memo[place]

    def _name(self, name: str) -> None:
        if name not in _NAMES:
            raise ValueError(f"asks for {name!r}, which is no plain data")
        self._stack.append(_Name(name))

    def _reduce(self) -> None:
        """What numpy and Python write as a call, as the value that it stands for."""
        name, arguments = self._take(2)
        if type(name) is not _Name or type(arguments) is not tuple:
            raise ValueError("calls something that is no plain data")
        self._stack.append(self._meant(name, arguments))

    def _meant(self, name: str, arguments: tuple[Any, ...]) -> Any:
        if name in _RECONSTRUCT and len(arguments) == 3 and arguments[0] == _ARRAY and type(arguments[0]) is _Name:
            return _Array()
        if name in _FROM_BUFFER and len(arguments) == 4:
            array = _Array()
            array.fill(*arguments)
            return array
        if name == _DTYPE and arguments and isinstance(arguments[0], str) and arguments[0] in _NUMBERS:
            return _Dtype(arguments[0])
        if name in _SCALAR and len(arguments) == 2:
            return _numbers(arguments[1], arguments[0], ())[0].item()
        if name in _BYTES and not arguments:
            return b""
        if name == _ENCODE and len(arguments) == 2 and isinstance(arguments[0], str):
            self._encoded_bytes += len(arguments[0])
            if arguments[1] in ("latin1", "latin-1") and self._encoded_bytes <= MAX_BYTES:
                return arguments[0].encode("latin-1")
        raise ValueError(f"calls {name!r} for what is no plain data{_first_text(arguments)}")

    def _build(self) -> None:
        state = self._pop()
        if not isinstance(self._top(), _Array | _Dtype):
            raise ValueError("sets the state of what is no numpy array")
        self._top().build(state)


class _Plain:
    """From what the stream made to the value that is handed out."""

    def __init__(self) -> None:
        self._values = 0

    def of(self, value: Any, depth: int = 0) -> Any:
        """A copy in plain types, of which nothing is in the making any more."""
        self._values += 1
        if self._values > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values")
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH}, or contains itself")
        if value is None or type(value) in _SCALARS:
            return value
        if type(value) is list:
            return [self.of(part, depth + 1) for part in value]
        if type(value) is tuple:
            return tuple(self.of(part, depth + 1) for part in value)
        if type(value) is _Pairs:
            return {self._key(key, depth + 1): self.of(part, depth + 1) for key, part in value}
        if isinstance(value, _Array) and value.values is not None:
            return value.values
        raise ValueError(f"holds {_described(value)}, which is no plain data")

    def _key(self, key: Any, depth: int) -> Any:
        plain = self.of(key, depth)
        hash(plain)  # TypeError: a list, say
        return plain


def _paired(values: list[Any]) -> list[tuple[Any, Any]]:
    if len(values) % 2:
        raise ValueError("a key has no value")
    return list(zip(values[::2], values[1::2], strict=True))


def _texts(values: list[Any]) -> list[str]:
    if not all(type(value) is str for value in values):
        raise ValueError("asks for a name that is no text")
    return values


def _one_of(value: Any, *known: Any) -> Any:
    if value not in known:
        raise ValueError("a numpy array has an unknown order")
    return value


def _asked(operation: str, argument: Any) -> str:
    """The name in the argument of a refused opcode: of a class, or of an object elsewhere."""
    return f": {argument[:100]!r}" if isinstance(argument, str) and operation in ("INST", "PERSID") else ""


def _first_text(arguments: tuple[Any, ...]) -> str:
    return f": {arguments[0][:100]!r}" if arguments and isinstance(arguments[0], str) else ""


def _described(value: Any) -> str:
    if isinstance(value, _Name):
        return repr(str(value))
    return "a bytearray" if isinstance(value, _Buffer) else "an unfinished numpy array or dtype"
