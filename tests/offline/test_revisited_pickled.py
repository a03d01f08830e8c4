"""Plain data of pickles: what comes back, and what is refused without being run."""

import collections
import contextlib
import datetime
import math
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offline.data import pickled
from offline.data.pickled import MAX_DEPTH, plain_data, read_pickled
from offline.errors import DataError, DataMissing

PROTOCOLS = range(6)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**300), 2**300)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec=None, exclude_categories=()))
    | st.binary()
)
KEYS = SCALARS | st.tuples(SCALARS, SCALARS)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4) | st.lists(inner, max_size=4).map(tuple)
    ),
    max_leaves=12,
)


def same(a: Any, b: Any) -> bool:
    """Equal in values and in all types: 1, 1.0 and True are three values."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return len(a) == len(b) and all(same(x, y) and same(a[x], b[y]) for x, y in zip(a, b, strict=True))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b) and (not isinstance(a, float) or math.copysign(1, a) == math.copysign(1, b))


@given(PLAIN, st.sampled_from(PROTOCOLS))
@settings(max_examples=300, deadline=None)
def test_plain_data_comes_back_as_it_was(value: Any, protocol: int) -> None:
    assert same(plain_data(pickle.dumps(value, protocol)), value)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["?", "i1", "<i4", ">i8", "u2", "f2", "f4", ">f8"])
def test_arrays_come_back_as_they_were(protocol: int, dtype: str) -> None:
    for shape in [(), (0,), (5,), (2, 3), (0, 4), (2, 1, 2)]:
        values = np.asarray(np.random.default_rng(0).random(shape) * 2).astype(dtype)
        turned = values.T
        back = plain_data(pickle.dumps({"a": values, "b": [turned, values]}, protocol))
        for got, expected in ((back["a"], values), (back["b"][0], turned), (back["b"][1], values)):
            assert got.dtype == expected.dtype
            assert got.shape == expected.shape
            assert np.array_equal(got, expected)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scalars_of_numpy_are_numbers(protocol: int) -> None:
    values = [np.int64(-3), np.float32(0.5), np.bool_(True), np.uint8(200)]
    assert same(plain_data(pickle.dumps(values, protocol)), [-3, 0.5, True, 200])


def test_what_python_2_wrote() -> None:
    """Strings are of bytes there, and numpy lies elsewhere; both of what follows hold the array [1, 200]."""
    wanted = {"imlist": ["é", "b'\\\n"], "easy": [1, 200]}
    binary = (
        b"\x80\x02}q\x00(U\x06imlistq\x01]q\x02(U\x01\xe9U\x04b'\\\neU\x04easyq\x03"
        b"cnumpy.core.multiarray\n_reconstruct\nq\x04cnumpy\nndarray\nq\x05K\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02i8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x10\x01\x00\x00\x00\x00\x00\x00\x00\xc8\x00\x00\x00\x00\x00\x00\x00tbu."
    )
    text = (
        b"(dp0\nS'imlist'\np1\n(lp2\nS'\\xe9'\naS\"b'\\\\\\n\"\nasS'easy'\np3\n"
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        b"(I1\n(I2\ntcnumpy\ndtype\n(S'i8'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
        b"I00\nS'\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\xc8\\x00\\x00\\x00\\x00\\x00\\x00\\x00'\ntbs."
    )
    for stream in (binary, text):
        expected = pickle.loads(stream, encoding="latin1")  # noqa: S301  # written above
        for found in (plain_data(stream), expected):
            assert {name: list(value) for name, value in found.items()} == wanted


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Plain:
    """An instance of a class, which is no plain data."""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_trap_is_refused_by_name_and_not_sprung(tmp_path: Path, protocol: int) -> None:
    stream = pickle.dumps({"imlist": [Trap(tmp_path / "sprung")]}, protocol)
    with pytest.raises(DataError, match=r"(posix|nt) mkdir"):
        plain_data(stream)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(stream)  # noqa: S301
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        frozenset("a"),
        bytearray(b"abc"),
        1j,
        datetime.date(2020, 1, 1),
        collections.OrderedDict(a=1),
        Plain(),
        Plain,
        len,
        np.array([{}], dtype=object),
        np.array(["a"]),
        np.array([1j]),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f4")]),
        np.array([0], dtype="M8[s]"),
        np.float32,
        np.dtype("f4"),
        slice(1),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, np.ndarray) else f"array-{value.dtype.kind}",
)
def test_what_is_no_plain_data_is_refused(value: Any, protocol: int) -> None:
    with pytest.raises(DataError, match="plain data"):
        plain_data(pickle.dumps([value], protocol))


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "'os system'"),
        (b"(S'true'\nios\nsystem\n.", "INST at byte 9.*'os system'"),
        (b"(cos\nsystem\nS'true'\no.", "'os system'"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "STACK_GLOBAL at byte 14: asks for 'os system'"),
        (b"\x80\x04K\x01\x8c\x06system\x93.", "no text"),
        (b"c__builtin__\neval\n(S'1'\ntR.", "'__builtin__ eval'"),
        (b"c_codecs\nencode\n(Vx\nVrot13\ntR.", "calls '_codecs encode'"),
        (b"cnumpy\nndarray\n(I9\ntR.", "calls 'numpy ndarray'"),
        (b"cnumpy\ndtype\n(S'O8'\nI0\nI1\ntR.", "'O8'"),
        (b"cnumpy\nndarray\n.", "'numpy ndarray'"),
        (b"cnumpy\nndarray\n)\x81.", "NEWOBJ"),
        (b"Pos.system\n.", "PERSID.*'os.system'"),
        (b"K\x01Q.", "BINPERSID"),
        (b"\x82\x01.", "EXT1"),
        (b"\x8f.", "EMPTY_SET"),
        (b"\x97.", "NEXT_BUFFER"),
        (b"]2.", "DUP"),
        (b"]}b.", "no numpy array"),
        (b"K\x01)R.", "calls something"),
        (b"\x80\x06N.", "protocol 6"),
        (b"}]K\x01s.", "TypeError|unhashable"),
        (b"(K\x01d.", "no value"),
        (b"K\x01K\x02.", "2 values are left"),
        (b"(K\x01.", "left"),
        (b".", "0 values"),
        (b"N.N", "1 bytes follow"),
        (b"N", "ends before"),
        (b"", "ends before"),
        (b"{}", "not known"),
        (b"h\x07.", "value 7"),
        (b"e.", "no mark"),
        (b"(a.", "too few"),
        (b"N(K\x01e.", "no list"),
        (b"](K\x01K\x02u.", "no dict"),
        (b"X\xff\x00\x00\x00a.", "BINUNICODE"),
        (b"I1x\n.", "INT"),
        (b"S'a\n.", "not quoted"),
        (b"S'\\q'\n.", "STRING"),
    ],
)
def test_hostile_and_damaged_streams_are_refused_by_what_they_ask_for(stream: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        plain_data(stream, "gnd.pkl")


def array(shape: bytes, data: bytes, number: bytes = b"i1", order: bytes = b"|") -> bytes:
    """A numpy array as protocol 2 has it, of any shape and buffer."""
    return (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
        + shape
        + b"cnumpy\n"
        b"dtype\nU\x02"
        + number
        + b"K\x00K\x01\x87R(K\x03U\x01"
        + order
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U" + bytes([len(data)]) + data + b"tb."
    )


def test_arrays_that_do_not_fit_their_buffer_are_refused() -> None:
    assert plain_data(array(b"K\x02\x85", b"ab")).tolist() == [97, 98]
    for shape in (b"K\x03\x85", b"K\x01\x85", b"J\xff\xff\xff\xff\x85", b"G" + b"@\x00" + b"\x00" * 6 + b"\x85", b"N"):
        with pytest.raises(DataError, match="array"):
            plain_data(array(shape, b"ab"))
    with pytest.raises(DataError):
        plain_data(array(b"K\x00\x8a\x09" + b"\xff" * 8 + b"\x00\x86", b""))  # (0, 2^64 - 1)
    with pytest.raises(DataError, match="dtype"):
        plain_data(array(b"K\x02\x85", b"ab", order=b"x"))


def test_sizes_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    deep: list[Any] = []
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    assert plain_data(pickle.dumps(deep)) == deep
    with pytest.raises(DataError, match="nested deeper"):
        plain_data(pickle.dumps([[deep]]))
    with pytest.raises(DataError, match="nested deeper"):
        plain_data(b"]" + b"\x85" * 200_000 + b".")
    with pytest.raises(DataError, match="contains itself"):
        plain_data(b"]q\x00h\x00a.")
    laughs: list[Any] = [1]
    for _ in range(40):
        laughs = [laughs, laughs]
    monkeypatch.setattr(pickled, "MAX_VALUES", 1000)
    with pytest.raises(DataError, match="more than 1000 values"):
        plain_data(pickle.dumps(laughs))
    with pytest.raises(DataError, match="more than 1000 opcodes"):
        plain_data(pickle.dumps(list(range(1001))))
    amplified = b"(c_codecs\nencode\np0\n(V" + b"x" * 64 + b"\nVlatin1\ntp1\nR" + b"g0\ng1\nR" * 8 + b"l."
    assert plain_data(amplified) == [b"x" * 64] * 9
    monkeypatch.setattr(pickled, "MAX_BYTES", len(amplified))
    with pytest.raises(DataError, match="_codecs encode"):
        plain_data(amplified)
    with pytest.raises(DataError, match=f"larger than {len(amplified)} bytes"):
        plain_data(pickle.dumps("x" * len(amplified)))


def a_ground_truth(protocol: int) -> bytes:
    rows = np.array([3, 5])
    gnd = [{"bbx": [1.0, 2.5], "easy": rows, "hard": [1], "junk": np.array([]), "x": (None, True, b"\x00", 2**70)}]
    return pickle.dumps({"imlist": ["a", "b" * 300], "gnd": gnd}, protocol)


@given(st.data())
@settings(max_examples=600, deadline=None)
def test_damage_leads_to_one_kind_of_error(data: st.DataObject) -> None:
    stream = bytearray(a_ground_truth(data.draw(st.sampled_from(PROTOCOLS))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(stream) - 1))
        kind = data.draw(st.sampled_from(["set", "cut", "insert"]))
        byte = data.draw(st.integers(0, 255))
        stream[at : at + (kind != "insert")] = b"" if kind == "cut" else bytes([byte])
        if not stream:
            break
    with contextlib.suppress(DataError):
        plain_data(bytes(stream))


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_noise_leads_to_one_kind_of_error(stream: bytes) -> None:
    with contextlib.suppress(DataError):
        plain_data(stream)


def test_files_are_read_and_named_in_errors(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps([1, "b"]))
    assert read_pickled(tmp_path / "a.pkl") == [1, "b"]
    with pytest.raises(DataMissing):
        read_pickled(tmp_path / "absent.pkl")
    (tmp_path / "bad.pkl").write_bytes(b"cos\nsystem\n.")
    with pytest.raises(DataError, match=r"bad\.pkl.*os system"):
        read_pickled(tmp_path / "bad.pkl")
