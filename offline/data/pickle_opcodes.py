"""A pickle's opcodes one after the other, by the tables of `pickletools`, which take a stream apart and run nothing.

Owns where an opcode begins and ends. Knows not what opcodes do: see `offline.data.pickled`.
"""

import io
import pickletools
import re
import struct
from collections.abc import Iterator
from typing import Any

WRONG = (ValueError, TypeError, KeyError, IndexError, OverflowError, AssertionError, RecursionError, struct.error)
"""What damaged streams lead to."""

_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"\\": b"\\", b"'": b"'", b'"': b'"'}


def operations(stream: bytes) -> Iterator[tuple[int, str, Any]]:
    """Position, name and argument of each opcode up to the end, as `pickletools.genops` but for quoted strings.

    Those of Python 2 may hold any byte, of which genops takes ASCII alone.
    """
    file = io.BytesIO(stream)
    while True:
        position = file.tell()
        code = file.read(1)
        if not code:
            raise ValueError("ends before its STOP")
        if code not in _OPCODES:
            raise ValueError(f"opcode {code!r} at byte {position} is not known")
        opcode = _OPCODES[code]
        try:
            argument: Any = None
            if opcode.arg is not None:
                argument = _quoted(file.readline()) if opcode.name == "STRING" else opcode.arg.reader(file)
        except WRONG as error:
            raise ValueError(f"{opcode.name} at byte {position}: {error}") from error
        yield position, opcode.name, argument
        if opcode.name == "STOP":
            break
    if file.tell() != len(stream):
        raise ValueError(f"{len(stream) - file.tell()} bytes follow its end")


def _quoted(line: bytes) -> str:
    """A string as Python 2 writes it, quotes and escapes undone."""
    text = line[:-1]
    if line[-1:] != b"\n" or len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b"'", b'"'):
        raise ValueError("a string is not quoted")
    return _ESCAPE.sub(_unescaped, text[1:-1]).decode("latin-1")


def _unescaped(match: re.Match[bytes]) -> bytes:
    escape = match[1]
    return bytes([int(escape[1:], 16)]) if len(escape) == 3 else _ESCAPED[escape]
