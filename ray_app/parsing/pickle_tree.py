"""A pickle as a tree of plain values, built by walking its opcodes: nothing it names is looked up, made or called.

A name becomes a `Name`, a call of it a `Call`; who asked for the tree says what those of a known shape mean. Bytes
are views of the input, so a tree takes little more memory than its opcodes, whose number and nesting are bounded.
"""

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_DEPTH = 32
"""Nesting of tuples, lists, dictionaries and calls; a dictionary of arrays has six levels."""
MAX_STACK = 4096
"""Values waiting for the opcode that takes them; Python's pickler puts 2,000 there for a large dictionary."""
MAX_TEXT_BYTES = 4096
"""Longer texts stay bytes."""
MAX_NUMBER_BYTES = 64
"""Longer whole numbers are refused: reading them takes quadratic time."""
MAX_LINE_BYTES = 1024
"""Longest name of a module or of something in it."""
LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}
"""Bytes of the length in front of a value of any length."""
OPCODES: dict[str, pickletools.OpcodeInfo] = {opcode.code: opcode for opcode in pickletools.opcodes}
AS_READ = {"BININT", "BININT1", "BININT2", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
TEXTS = {"BINUNICODE": "utf-8", "SHORT_BINUNICODE": "utf-8", "BINUNICODE8": "utf-8"}
PYTHON_2 = {"BINSTRING": "latin-1", "SHORT_BINSTRING": "latin-1"}
"""Python 2 wrote bytes and texts alike."""
CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
KEYS = (str, int, float, bool, type(None))
"""Types of a dictionary's keys: none whose hash walks through other values."""
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class ForbiddenName(ValueError):
    """A pickle asks for something that is not admitted."""


@dataclass(frozen=True, slots=True, eq=False)
class Name:
    """Something that the pickle asks for, which is not looked up."""

    module: str
    """Its module."""
    name: str
    """Its name there."""

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False)
class Call:
    """A call that the pickle asks for, which is not made."""

    name: Name
    """Name that is called."""
    args: tuple[Any, ...]
    """Arguments."""
    state: Any = None
    """State that is given to the result."""
    items: dict[Any, Any] = field(default_factory=dict)
    """Items that are put into the result, where it is a mapping."""


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A text of more than `MAX_TEXT_BYTES`, as it was written."""

    data: memoryview
    """UTF-8."""


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """Something outside of the pickle: a persistent id."""

    id: Any
    """The id."""


@dataclass(slots=True)
class _Item:
    """A value on the stack."""

    value: Any
    depth: int = 0


class PickleTree:
    """Reads one pickle."""

    def __init__(self, data: memoryview, admitted: Callable[[Name], bool], max_opcodes: int) -> None:
        self._data, self._admitted, self._left = data, admitted, max_opcodes
        self._at = 0
        self._stack: list[_Item] = []
        self._marks: list[int] = []
        self._memo: dict[int, _Item] = {}

    def read(self) -> Any:
        """Return the tree."""
        while True:
            opcode = OPCODES.get(chr(self._take(1)[0]))
            if opcode is None:
                raise ValueError(f"byte {self._at - 1} is no opcode")
            self._left -= 1
            if self._left < 0 or len(self._stack) > MAX_STACK or len(self._marks) > MAX_DEPTH:
                raise ValueError(f"at byte {self._at} it has more values or levels than are read")
            if opcode.name == "STOP":
                return self._pop().value
            self._step(opcode.name, self._argument(opcode))

    def _take(self, size: int) -> memoryview:
        part = self._data[self._at : self._at + size]
        if size < 0 or len(part) < size:
            raise ValueError(f"it ends within a value, at byte {len(self._data)}")
        self._at += size
        return part

    def _argument(self, opcode: pickletools.OpcodeInfo) -> Any:
        """Argument of an opcode; bytes, texts and long numbers as views."""
        if opcode.arg is None:
            return None
        size = opcode.arg.n
        if size in LENGTHS:
            signed = size == pickletools.TAKEN_FROM_ARGUMENT4
            return self._take(int.from_bytes(self._take(LENGTHS[size]), "little", signed=signed))
        if size == pickletools.UP_TO_NEWLINE:
            return self._line()
        return opcode.arg.reader(io.BytesIO(self._take(size)))

    def _line(self) -> str:
        line, newline, _ = bytes(self._data[self._at : self._at + MAX_LINE_BYTES]).partition(b"\n")
        if not newline:
            raise ValueError(f"the line at byte {self._at} is too long, or cut short")
        self._at += len(line) + 1
        return line.decode()

    def _step(self, opcode: str, argument: Any) -> None:
        if opcode in ("PROTO", "FRAME"):
            return
        if opcode in CONSTANTS:
            self._push(CONSTANTS[opcode])
        elif opcode in AS_READ:
            self._push(argument)
        elif opcode in TEXTS:
            self._push(str(argument, "utf-8", "surrogatepass") if len(argument) <= MAX_TEXT_BYTES else Text(argument))
        elif opcode in PYTHON_2:
            self._push(str(argument, "latin-1") if len(argument) <= MAX_TEXT_BYTES else argument)
        elif opcode in ("LONG1", "LONG4"):
            if len(argument) > MAX_NUMBER_BYTES:
                raise ValueError(f"it has a whole number of {len(argument)} bytes")
            self._push(int.from_bytes(argument, "little", signed=True))
        elif opcode == "MARK":
            self._marks.append(len(self._stack))
        elif opcode in TUPLES:
            self._push_tuple([self._pop() for _ in range(TUPLES[opcode])][::-1])
        elif opcode == "TUPLE":
            self._push_tuple(self._since_mark())
        elif opcode == "EMPTY_LIST":
            self._push([], 1)
        elif opcode == "EMPTY_DICT":
            self._push({}, 1)
        elif opcode == "APPEND":
            self._append([self._pop()])
        elif opcode == "APPENDS":
            self._append(self._since_mark())
        elif opcode == "SETITEM":
            self._set_items([self._pop(), self._pop()][::-1])
        elif opcode == "SETITEMS":
            self._set_items(self._since_mark())
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = self._top()
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._top()
        elif opcode in ("BINGET", "LONG_BINGET"):
            item = self._memo[argument]
            self._push(item.value, item.depth)
        elif opcode == "GLOBAL":
            self._push_name(argument, self._line())
        elif opcode == "STACK_GLOBAL":
            name, module = self._pop().value, self._pop().value
            self._push_name(module, name)
        elif opcode in ("REDUCE", "NEWOBJ"):
            args, name = self._pop(), self._pop().value
            if not isinstance(name, Name) or not isinstance(args.value, tuple):
                raise ValueError("it calls what is no name")
            self._push(Call(name, args.value), args.depth + 1)
        elif opcode == "BUILD":
            state, top = self._pop(), self._top()
            if not isinstance(top.value, Call):
                raise ValueError("it sets the state of what is no call")
            top.value.state = state.value
            self._deepen(top, [state])
        elif opcode == "BINPERSID":
            item = self._pop()
            self._push(Reference(item.value), item.depth + 1)
        else:
            raise ValueError(f"it has the opcode {opcode}, which is not needed for plain values")

    def _push(self, value: Any, depth: int = 0) -> None:
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        self._stack.append(_Item(value, depth))

    def _pop(self) -> _Item:
        item = self._top()
        del self._stack[-1]
        return item

    def _top(self) -> _Item:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("it takes a value where there is none")
        return self._stack[-1]

    def _since_mark(self) -> list[_Item]:
        if not self._marks:
            raise ValueError("it looks for a mark where there is none")
        mark = self._marks.pop()
        items = self._stack[mark:]
        del self._stack[mark:]
        return items

    def _deepen(self, holder: _Item, items: list[_Item]) -> None:
        holder.depth = max(holder.depth, 1 + max((item.depth for item in items), default=0))
        if holder.depth > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")

    def _push_tuple(self, items: list[_Item]) -> None:
        self._push(tuple(item.value for item in items), 1 + max((item.depth for item in items), default=0))

    def _append(self, items: list[_Item]) -> None:
        holder = self._top()
        if not isinstance(holder.value, list):
            raise ValueError("it appends to what is no list")
        holder.value.extend(item.value for item in items)
        self._deepen(holder, items)

    def _set_items(self, items: list[_Item]) -> None:
        holder = self._top()
        target = holder.value.items if isinstance(holder.value, Call) else holder.value
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError("it sets items of what is no dictionary")
        for key, item in zip(items[::2], items[1::2], strict=True):
            if type(key.value) not in KEYS:
                raise ValueError(f"a dictionary has a key that is no text or number but a {type_name(key.value)}")
            target[key.value] = item.value
        self._deepen(holder, items)

    def _push_name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("it asks for a name that is no text")
        asked = Name(module, name)
        if not self._admitted(asked):
            raise ForbiddenName(str(asked))
        self._push(asked)


def parse_pickle(data: memoryview, admitted: Callable[[Name], bool], max_opcodes: int) -> Any:
    """Return a pickle's tree. ForbiddenName: it asks for another name; ValueError: damaged, or beyond the limits."""
    try:
        return PickleTree(data, admitted, max_opcodes).read()
    except LookupError as error:
        raise ValueError(f"it refers to a value that is not there ({error})") from error


def type_name(value: Any) -> str:
    """Word for a value's type, in messages."""
    return str(value) if isinstance(value, Name) else type(value).__name__
