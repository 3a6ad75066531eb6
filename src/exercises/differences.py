"""Say in words how the value that an answer gave differs from the one that was wanted.

explaining.py uses it. Where a few tries find how the one becomes the other (transposed, scaled,
shifted by one, …), that is said too.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from exercises.reports import Raised, Table, Thing

SHOWN = 24  # numbers of a tensor that are all shown
SHORT = 80  # characters of a list that is shown whole
WIDTH = 180  # characters of a value that are shown


class Difference(NamedTuple):
    """Two values that differ, as texts, and how they do, if that was found."""

    gave: str
    wanted: str
    how: str = ""


def describe(value: object) -> str:
    """Describe a value in a line: its numbers if there are few, else its type and shape."""
    if isinstance(value, Raised):
        return f"raises {value.kinds[0]}: {value.message.partition(chr(10))[0]}".removesuffix(": ")
    if isinstance(value, Table):
        return describe_table(value)
    if isinstance(value, Thing):
        return shorten(value.text) or of_kind(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple | list):
        inside = ", ".join(describe(item) for item in value)
        if len(value) > 9 or len(inside) > WIDTH:
            return f"a {type(value).__name__} of {len(value)}"
        return f"({inside})" if isinstance(value, tuple) else f"[{inside}]"
    if isinstance(value, dict) and len(value) > 9:
        return f"a dict of {len(value)}"
    return shorten(repr(value))


def describe_table(table: Table) -> str:
    """Describe a tensor in a line."""
    numbers = table.numbers
    if numbers is None or numbers.numel() > SHOWN:
        return f"a {table.kind} of shape {table.shape} and dtype {table.dtype}"
    if numbers.numel() > 4 and (numbers == numbers.flatten()[0]).all():
        return f"{write(numbers.flatten()[0].item())} everywhere, shape {table.shape}"
    return rows(numbers.tolist())


def rows(numbers: object) -> str:
    """Write the numbers of a tensor, in brackets."""
    if isinstance(numbers, list):
        return f"[{', '.join(map(rows, numbers))}]"
    return write(numbers)


def write(number: object) -> str:
    """Write a number of a tensor."""
    return f"{number:.4g}" if isinstance(number, float) else str(number)


def shorten(text: str) -> str:
    """Cut a text that is too long."""
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 1]}…"


def difference(given: object, wanted: object) -> Difference | None:
    """Return what differs in two values, or None if nothing does."""
    if isinstance(given, Raised) and isinstance(wanted, Raised):
        if wanted.kinds[0] in given.kinds:
            return None  # the wording may differ
    elif isinstance(given, Table) and isinstance(wanted, Table):
        return table_difference(given, wanted)
    elif isinstance(given, tuple | list) and isinstance(wanted, tuple | list):
        return items_difference(given, wanted)
    elif isinstance(given, dict) and isinstance(wanted, dict):
        return dict_difference(given, wanted)
    elif type(given) is type(wanted) and (given == wanted or close(given, wanted)):
        return None
    elif is_number(given) and is_number(wanted) and type(given) is type(wanted):
        return Difference(describe(given), describe(wanted), number_change(given, wanted))
    return Difference(named(given, wanted), named(wanted, given), kind_change(given, wanted))


def named(value: object, other: object) -> str:
    """Describe a value, with its type if the other's looks the same."""
    text = describe(value)
    return f"{text}, {of_kind(value)}" if text == describe(other) else text


def kind_of(value: object) -> str:
    """Return the name of a value's type."""
    if isinstance(value, Table | Thing):
        return value.kind
    return "error" if isinstance(value, Raised) else type(value).__name__


def of_kind(value: object) -> str:
    """Return the name of a value's type with its article."""
    kind = kind_of(value)
    if value is None:
        return "None"
    return f"an {kind}" if kind[0].lower() in "aeiou" else f"a {kind}"


def kind_change(given: object, wanted: object) -> str:
    """Say that two types differ, unless one is an error or they are alike."""
    kinds = kind_of(given), kind_of(wanted)
    if "error" in kinds or kinds[0] == kinds[1]:
        return ""
    return f"it is {of_kind(given)}, and should be {of_kind(wanted)}"


def items_difference(
    given: tuple[object, ...] | list[object], wanted: tuple[object, ...] | list[object]
) -> Difference | None:
    """Return the first difference of the items of two tuples or lists."""
    if type(given) is not type(wanted):
        return Difference(describe(given), describe(wanted), kind_change(given, wanted))
    if len(given) != len(wanted):
        return Difference(
            describe(given), describe(wanted), f"it has {len(given)} items, not {len(wanted)}"
        )
    for number, (a, b) in enumerate(zip(given, wanted, strict=True), start=1):
        if found := difference(a, b):
            texts = describe(given), describe(wanted)
            if texts[0] != texts[1] and max(map(len, texts)) <= SHORT:
                return Difference(*texts)
            return Difference(f"item {number}: {found[0]}", f"item {number}: {found[1]}", found.how)
    return None


def dict_difference(given: dict[str, object], wanted: dict[str, object]) -> Difference | None:
    """Return the first difference of two dictionaries."""
    if given.keys() != wanted.keys():
        return Difference(f"the keys {', '.join(given)}", f"the keys {', '.join(wanted)}")
    for key, value in wanted.items():
        if found := difference(given[key], value):
            return Difference(f"{key}: {found.gave}", f"{key}: {found.wanted}", found.how)
    return None


def table_difference(given: Table, wanted: Table) -> Difference | None:
    """Return what differs in two tensors: shape, dtype, device, numbers or gradient."""
    if given.shape != wanted.shape:
        return Difference(in_shape(given), in_shape(wanted), shape_change(given, wanted))
    if given.dtype != wanted.dtype:
        return Difference(
            f"{describe(given)}, {given.dtype}", f"{describe(wanted)}, {wanted.dtype}",
            f"its dtype is {given.dtype}, and should be {wanted.dtype}",
        )  # fmt: skip
    if given.device != wanted.device:
        return Difference(f"a tensor on {given.device}", f"a tensor on {wanted.device}")
    if given.numbers is not None and wanted.numbers is not None:
        wrong = ~same(given.numbers, wanted.numbers)
        if wrong.any():
            how = next(changes(given.numbers, wanted.numbers), "")
            return Difference(
                at_first(given, wrong), at_first(wanted, wrong), how or which_are_wrong(wrong)
            )
    if given.gradient != wanted.gradient:
        return Difference(
            f"a tensor with {'a' if given.gradient else 'no'} gradient",
            f"one with {'a' if wanted.gradient else 'no'} gradient",
            "" if given.gradient else "its numbers are right, but nothing can learn from them: "
            "has it been detached, or computed without gradients?",
        )  # fmt: skip
    return None


def in_shape(table: Table) -> str:
    """Describe a tensor, with its shape."""
    text = describe(table)
    return text if "shape" in text else f"{text}, shape {table.shape}"


def in_dtype(table: Table) -> str:
    """Describe a tensor, with its dtype."""
    text = describe(table)
    return text if "dtype" in text else f"{text}, dtype {table.dtype}"


def shape_change(given: Table, wanted: Table) -> str:
    """Say how two shapes differ, if the numbers are the same or the shapes are alike."""
    a = given.numbers
    b = wanted.numbers
    if a is not None and b is not None and a.numel() == b.numel():
        if same(a.flatten(), b.flatten()).all():
            return "the numbers are right, the shape is not"
        if a.dim() >= 2 and a.mT.shape == b.shape and same(a.mT, b).all():
            return "the last two dimensions are swapped"
    if sorted(given.shape) == sorted(wanted.shape):
        return "two dimensions are swapped"
    if len(given.shape) != len(wanted.shape):
        return f"it has {len(given.shape)} dimensions, not {len(wanted.shape)}"
    return ""


def at_first(table: Table, wrong: Tensor) -> str:
    """Describe a tensor: all its numbers, or the first wrong one."""
    assert table.numbers is not None
    if wrong.numel() <= SHOWN:
        return describe(table)
    place = wrong.nonzero()[0].tolist()
    return f"{write(table.numbers[tuple(place)].item())} at {place}, shape {table.shape}"


def which_are_wrong(wrong: Tensor) -> str:
    """Say how many numbers are wrong, and where, if they stand in one row or column."""
    count = int(wrong.sum())
    total = wrong.numel()
    if count == total:
        return "every number is wrong" if total > 1 else ""
    places = wrong.nonzero()
    for axis in range(wrong.dim()):
        index = places[:, axis].unique().tolist()
        if len(index) == 1 and wrong.shape[axis] > 1 and count > 1:
            return f"all wrong numbers have the index {index[0]} in dimension {axis}"
    return f"{count} of {total} numbers {'is' if count == 1 else 'are'} wrong"


def same(a: Tensor, b: Tensor) -> Tensor:
    """Return where two tensors are equal, except for rounding."""
    if a.dtype.is_floating_point:
        return torch.isclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
    return a == b


def changes(given: Tensor, wanted: Tensor) -> Iterator[str]:
    """Yield how a tensor might have been made from the wanted one, of the same shape."""
    if given.dtype == torch.bool:
        if (given == ~wanted).all():
            yield "True and False are swapped"
    elif given.dtype.is_floating_point and given.isnan().any() and not wanted.isnan().any():
        yield "there is a NaN"
    yield from moves(given, wanted)
    if given.dtype.is_floating_point:
        yield from other_axis(given, wanted)
    if given.dtype != torch.bool:
        yield from sums_and_products(given, wanted)


def moves(given: Tensor, wanted: Tensor) -> Iterator[str]:
    """Yield the ways of moving numbers that turn the wanted tensor into the given one."""
    if (wanted == wanted.flatten()[:1]).all():
        return  # wherever they are moved, they are the same
    for first in range(given.dim()):
        for second in range(first + 1, given.dim()):
            swapped = wanted.transpose(first, second)
            if swapped.shape == given.shape and same(given, swapped).all():
                yield f"it is transposed: dimensions {first} and {second} are swapped"
    for axis in range(given.dim()):
        size = given.shape[axis]
        if size < 2:
            continue
        if same(given, wanted.flip(axis)).all():
            yield f"it is reversed along dimension {axis}"
        for back, direction in ((False, "late"), (True, "early")):
            a = given.narrow(axis, 0 if back else 1, size - 1)
            b = wanted.narrow(axis, 1 if back else 0, size - 1)
            if size > 2 and same(a, b).all():
                yield f"along dimension {axis}, everything stands one place too {direction}"
    if same(given.flatten().sort().values, wanted.flatten().sort().values).all():
        yield "the numbers are right, but stand in other places"


def other_axis(given: Tensor, wanted: Tensor) -> Iterator[str]:
    """Yield the dimension over which a softmax was taken by mistake."""

    def sums_to_one(numbers: Tensor, axis: int) -> bool:
        sums = numbers.sum(dim=axis)
        return bool(((sums - 1).abs() < 1e-4).all())

    for axis in range(given.dim()):
        for right in range(given.dim()):
            if axis != right and given.shape[axis] > 1 and given.shape[right] > 1:
                mixed = sums_to_one(given, axis) and not sums_to_one(given, right)
                if mixed and sums_to_one(wanted, right):
                    yield f"it sums to 1 over dimension {axis}; it should over dimension {right}"


def sums_and_products(given: Tensor, wanted: Tensor) -> Iterator[str]:
    """Yield the factor of all numbers, or the number that was added to all."""
    if given.numel() == 1:
        if words := number_change(given.item(), wanted.item()):
            yield words
        return
    whole = not given.dtype.is_floating_point  # then nothing was rounded
    given = given.double()
    wanted = wanted.double()
    largest = wanted.abs().argmax()
    factor = (given.flatten()[largest] / wanted.flatten()[largest]).item()
    products = wanted * factor
    if math.isfinite(factor) and all_equal(given, products, whole):
        yield product(factor)
    offset = (given - wanted).flatten()[0].item()
    if math.isfinite(offset) and all_equal(given, wanted + offset, whole):
        yield f"each number is too {'large' if offset > 0 else 'small'} by {abs(offset):.4g}"


def all_equal(a: Tensor, b: Tensor, whole: bool) -> bool:
    """Return whether two tensors are equal: whole numbers exactly, others but for rounding."""
    return torch.equal(a, b) if whole else bool(same(a, b).all())


def product(factor: float) -> str:
    """Put the factor of all numbers into words."""
    if factor == 0:
        return "all numbers are 0"
    if math.isclose(factor, -1, rel_tol=1e-3):
        return "each number has the opposite sign"
    words = f"each number is {factor:.4g} times what it should be"
    for whole in range(2, 65):
        if math.isclose(factor, 1 / whole, rel_tol=1e-3):
            return f"each number is 1/{whole} of what it should be"
        if math.isclose(factor, whole**0.5, rel_tol=1e-3) and whole**0.5 % 1:
            return f"{words}: √{whole}"
        if math.isclose(factor, whole**-0.5, rel_tol=1e-3) and whole**0.5 % 1:
            return f"{words}: 1/√{whole}"
    return words


def number_change(given: object, wanted: object) -> str:
    """Put the factor of a number into words, if it is a plain one, and no number of a token."""
    if not isinstance(given, float) or not isinstance(wanted, float):
        return ""
    if wanted == 0 or not math.isfinite(given):
        return ""
    factor = given / wanted
    for whole in range(2, 65):
        if math.isclose(factor, whole, rel_tol=1e-4):
            return f"it is {whole} times what it should be"
        if math.isclose(factor, 1 / whole, rel_tol=1e-4):
            return f"it is 1/{whole} of what it should be"
    return "it has the opposite sign" if math.isclose(factor, -1, rel_tol=1e-4) else ""


def is_number(value: object) -> bool:
    """Return whether a value is a number, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def close(a: object, b: object) -> bool:
    """Return whether two values are floats that are equal, except for rounding."""
    if not isinstance(a, float) or not isinstance(b, float):
        return False
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-5) or (math.isnan(a) and math.isnan(b))
