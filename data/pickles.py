"""Pickles read as plain data: nothing in them can run.

A pickle is a program for a small stack machine. Python's own machine may import and call; the one here has no
instruction that does. It builds lists, tuples, dicts, OrderedDicts, strings and numbers, and refuses all else by name.

It also hands out the items of the outermost list as they come, by the thousand that Python's pickler writes at a time,
and keeps only what the pickle refers to again: the largest file of the authors' release, some 200 million objects, would
not fit in the memory. Knows nothing of what the files mean.
"""

import mmap
import pickletools
import struct
from collections import OrderedDict
from pickle import APPEND, APPENDS, BINFLOAT, BINGET, BININT, BININT1, BININT2, BINPUT, BINUNICODE, BINUNICODE8, EMPTY_DICT
from pickle import EMPTY_LIST, EMPTY_TUPLE, FRAME, GLOBAL, LONG1, LONG_BINGET, LONG_BINPUT, MARK, MEMOIZE, NEWFALSE
from pickle import NEWTRUE, NONE, PROTO, REDUCE, SETITEM, SETITEMS, SHORT_BINUNICODE, STACK_GLOBAL, STOP, TUPLE, TUPLE1
from pickle import TUPLE2, TUPLE3

from data.download import InputError

# The instructions that the machine knows, by the bytes of argument that follow each.
ARGUMENT = dict.fromkeys([MARK, STOP, EMPTY_LIST, EMPTY_TUPLE, EMPTY_DICT, APPEND, APPENDS, SETITEM, SETITEMS], 0)
ARGUMENT |= dict.fromkeys([TUPLE, TUPLE1, TUPLE2, TUPLE3, NONE, NEWTRUE, NEWFALSE, MEMOIZE, STACK_GLOBAL, REDUCE], 0)
ARGUMENT |= dict.fromkeys([PROTO, BININT1, BINPUT, BINGET, LONG1, SHORT_BINUNICODE], 1) | {BININT2: 2}
ARGUMENT |= dict.fromkeys([BININT, LONG_BINPUT, LONG_BINGET, BINUNICODE], 4)
ARGUMENT |= dict.fromkeys([BINFLOAT, FRAME, BINUNICODE8], 8)
SIZED = {LONG1, SHORT_BINUNICODE, BINUNICODE, BINUNICODE8}  # the argument is the length of what follows it
EMPTY = {EMPTY_LIST: list, EMPTY_DICT: dict, EMPTY_TUPLE: tuple}
CONSTANTS = {NONE: None, NEWTRUE: True, NEWFALSE: False}
INTEGERS = {BININT: "<i", BININT1: "<B", BININT2: "<H"}
TUPLES = {TUPLE1: 1, TUPLE3: 3}


class Refused(Exception):
    """An instruction, or a name to import, that plain data do not need."""


def read_list(path):
    """Yield the items of the list that a pickle (of protocol 2 or later) holds.

    Raises InputError where it holds something else, is not whole, or needs more than plain data do.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield from build(data, needed_again(data))
    except Refused as error:
        raise InputError(f"{path}: {error} is not plain data; it is refused, and nothing of the file was run; fetch another") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (IndexError, KeyError, struct.error, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(f"{path}: not a whole pickle of a list ({type(error).__name__}: {error}); fetch it again") from None


def needed_again(data):
    """Which objects the pickle refers to later by their number: a flag for each number."""
    flags, at = bytearray(), 0
    while (op := data[at : at + 1]) != STOP:
        at += 1
        length = ARGUMENT.get(op)
        if length is None:
            if not op:
                raise ValueError("it is cut short")
            if op != GLOBAL:
                break  # the machine will refuse it, or a name that comes before it and tells more
            length = imported(data, at)[1] - at
        if op in SIZED:
            length += int.from_bytes(data[at : at + length], "little")
        elif op == BINGET or op == LONG_BINGET:
            number = int.from_bytes(data[at : at + length], "little")
            if number >= len(data):
                raise ValueError(f"it refers to object {number:,}, of fewer")
            if number >= len(flags):
                flags.extend(bytes(number + 1 - len(flags)))
            flags[number] = 1
        at += length
    return flags


def imported(data, at):
    """The class that an instruction with two lines of text imports, and the place behind it."""
    end = data.find(b"\n", data.find(b"\n", at) + 1) + 1
    return allowed(*data[at:end].decode("utf-8", "replace").split("\n")[:2]), end


def allowed(module, name):
    """The one class that may be imported; Refused for any other name."""
    if (module, name) != ("collections", "OrderedDict"):
        raise Refused(f"{module}.{name}")
    return OrderedDict


def build(data, flags):
    """The machine: yield the items of the outermost list. `below` holds the stacks under the open marks."""
    stack, below, memo, count, strings, at = [], [], {}, 0, {}, 0
    while (op := data[at : at + 1]) != STOP:
        at += 1
        length = ARGUMENT.get(op, 0)
        if op == MEMOIZE or op == BINPUT or op == LONG_BINPUT:
            number = int.from_bytes(data[at : at + length], "little") if length else count
            count += 1
            if number < len(flags) and flags[number]:
                memo[number] = stack[-1]
        elif op in SIZED:
            start = at + length
            length += int.from_bytes(data[at:start], "little")
            raw = data[start : at + length]
            if op == LONG1:
                stack.append(int.from_bytes(raw, "little", signed=True))
            elif (text := strings.get(raw)) is not None:
                stack.append(text)
            else:
                stack.append(raw.decode("utf-8", "surrogatepass"))
                if len(raw) < 24:  # a token: it will come again
                    strings[raw] = stack[-1]
        elif op == BINFLOAT:
            stack.append(struct.unpack_from(">d", data, at)[0])
        elif op == BINGET or op == LONG_BINGET:
            stack.append(memo[int.from_bytes(data[at : at + length], "little")])
        elif op == MARK:
            below.append(stack)
            stack = []
        elif op == APPENDS or op == APPEND:
            new, stack = (stack, below.pop()) if op == APPENDS else ([stack.pop()], stack)
            if below or len(stack) > 1:
                stack[-1].extend(new)
            else:
                yield from new
        elif op == TUPLE2:
            stack[-2:] = [(stack[-2], stack[-1])]
        elif op == GLOBAL:
            value, at = imported(data, at)
            stack.append(value)
        else:
            stack = other(op, data, at, stack, below)
        at += length
    if len(stack) != 1 or below or not isinstance(stack[0], list):
        raise ValueError(f"it holds a {type(stack[-1]).__name__}")


def other(op, data, at, stack, below):
    """The instructions that are neither frequent nor about the outermost list; returns the stack."""
    if op in EMPTY:
        stack.append(EMPTY[op]())
    elif op in CONSTANTS:
        stack.append(CONSTANTS[op])
    elif op in INTEGERS:
        stack.append(struct.unpack_from(INTEGERS[op], data, at)[0])
    elif op in TUPLES:
        stack[-TUPLES[op] :] = [tuple(stack[-TUPLES[op] :])]
    elif op == TUPLE:
        below[-1].append(tuple(stack))
        stack = below.pop()
    elif op == SETITEMS:
        below[-1][-1].update(zip(stack[::2], stack[1::2]))
        stack = below.pop()
    elif op == SETITEM:
        key, value = stack[-2:]
        stack[-3][key] = value
        del stack[-2:]
    elif op == STACK_GLOBAL:
        stack[-2:] = [allowed(*stack[-2:])]
    elif op == REDUCE:
        make, arguments = stack[-2:]
        if make is not OrderedDict:
            raise Refused(f"a call of {make!r}")
        stack[-2:] = [OrderedDict(*arguments)]
    elif op not in (PROTO, FRAME):
        raise Refused(f"the instruction {pickletools.code2op[op.decode('latin-1')].name}")
    return stack
