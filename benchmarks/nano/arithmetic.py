"""Column arithmetic written out one digit at a time.

Qwen's tokenizer makes every digit a token of its own, so a small transformer computes reliably only what fits in one
step: a digit sum with a carry, a digit product with a carry, a division from the times table. Every function here
returns a :class:`Worked`: the value together with the lines that derive it in such steps. The text is a function of
the operands alone, so a model that follows the method has exactly one right continuation.
"""

from dataclasses import dataclass

PLACES = ("ones", "tens", "hundreds", "thousands", "ten thousands", "hundred thousands", "millions")


@dataclass(frozen=True)
class Worked:
    """A value and the lines that derive it; the last line states ``expression=value``."""

    value: int
    lines: tuple[str, ...]


def digits_from_right(value: int) -> list[int]:
    """Return the decimal digits of a non-negative integer, ones first."""
    return [int(character) for character in reversed(str(value))]


def _from_digits(digits: list[int]) -> int:
    return int("".join(str(digit) for digit in reversed(digits)))


def add(a: int, b: int) -> Worked:
    """Add two non-negative integers by columns.

    Args:
        a: first summand.
        b: second summand.

    Returns:
        One line a column (``tens: 3+6+1=10, carry 1``), then the sum. Two single digits are added in one line.
    """
    if a < 10 and b < 10:
        return Worked(a + b, (f"{a}+{b}={a + b}",))
    a_digits, b_digits = digits_from_right(a), digits_from_right(b)
    width = max(len(a_digits), len(b_digits))
    lines, result, carry = [f"{a}+{b}:"], [], 0
    for place in range(width):
        terms = [digits[place] if place < len(digits) else 0 for digits in (a_digits, b_digits)]
        terms += [carry] if carry else []
        carry, digit = divmod(sum(terms), 10)
        result.append(digit)
        note = f", carry {carry}" if carry else ""
        lines.append(f"{PLACES[place]}: {'+'.join(map(str, terms))}={sum(terms)}{note}")
    if carry:
        lines.append(f"{PLACES[width]}: {carry}")
        result.append(carry)
    value = _from_digits(result)
    return Worked(value, (*lines, f"{a}+{b}={value}"))


def _subtract_smaller(a: int, b: int) -> Worked:
    """Subtract by columns where ``a >= b >= 0``."""
    if a < 10:
        return Worked(a - b, (f"{a}-{b}={a - b}",))
    a_digits, b_digits = digits_from_right(a), digits_from_right(b)
    lines, result, borrow = [f"{a}-{b}:"], [], 0
    for place, top in enumerate(a_digits):
        bottom = b_digits[place] if place < len(b_digits) else 0
        taken, must_borrow = f"-{borrow}" if borrow else "", top - borrow < bottom
        shown = top + 10 if must_borrow else top
        digit = shown - borrow - bottom
        borrow = int(must_borrow)
        result.append(digit)
        lines.append(f"{PLACES[place]}: {shown}{taken}-{bottom}={digit}{', borrow 1' if must_borrow else ''}")
    value = _from_digits(result)
    return Worked(value, (*lines, f"{a}-{b}={value}"))


def _sign(a: int, b: int) -> str:
    return "<" if a < b else ">" if a > b else "="


def compare(a: int, b: int) -> str:
    """Return the line that finds the larger number: digit counts first, then digits from the left until they differ."""
    a_text, b_text = str(a), str(b)
    parts = [f"{len(a_text)}{_sign(len(a_text), len(b_text))}{len(b_text)} digits"]
    if len(a_text) == len(b_text):
        for a_digit, b_digit in zip(a_text, b_text, strict=True):
            parts.append(f"{a_digit}{_sign(int(a_digit), int(b_digit))}{b_digit}")
            if a_digit != b_digit:
                break
    return f"Compare: {', '.join(parts)}"


def subtract(a: int, b: int) -> Worked:
    """Subtract two non-negative integers; a negative result is worked out as ``-(b-a)``."""
    lines: list[str] = [] if a < 10 and b < 10 else [compare(a, b)]
    if a >= b:
        worked = _subtract_smaller(a, b)
        return Worked(worked.value, (*lines, *worked.lines))
    flipped = _subtract_smaller(b, a)
    lines += [f"{a}<{b}, so {a}-{b}=-({b}-{a})", *flipped.lines, f"{a}-{b}={-flipped.value}"]
    return Worked(-flipped.value, tuple(lines))


def signed_sum(a: int, b: int) -> Worked:
    """Add two integers of any sign, reduced to one column addition or subtraction of their magnitudes.

    Args:
        a: first summand.
        b: second summand; a negative one is written as a subtraction (``20-5``).

    Returns:
        The steps, ending in the line ``a+b=value`` or ``a-|b|=value``.
    """
    if a >= 0:
        return add(a, b) if b >= 0 else subtract(a, -b)
    if b >= 0:
        turned, rule = subtract(b, -a), f"{a}+{b}={b}-{-a}"
        return Worked(turned.value, (rule, *turned.lines, f"{a}+{b}={turned.value}"))
    magnitude, rule = add(-a, -b), f"{a}-{-b}=-({-a}+{-b})"
    return Worked(-magnitude.value, (rule, *magnitude.lines, f"{a}-{-b}={-magnitude.value}"))


def _times_digit(a: int, digit: int) -> Worked:
    """Multiply a non-negative integer by one digit, column by column."""
    if a < 10 or digit == 0:
        return Worked(a * digit, (f"{a}*{digit}={a * digit}",))
    lines, result, carry = [f"{a}*{digit}:"], [], 0
    a_digits = digits_from_right(a)
    for place, top in enumerate(a_digits):
        total, note = top * digit + carry, f"+{carry}" if carry else ""
        carry, written = divmod(total, 10)
        result.append(written)
        lines.append(f"{PLACES[place]}: {top}*{digit}{note}={total}{f', carry {carry}' if carry else ''}")
    if carry:
        lines.append(f"{PLACES[len(a_digits)]}: {carry}")
        result.append(carry)
    value = _from_digits(result)
    return Worked(value, (*lines, f"{a}*{digit}={value}"))


def multiply(a: int, b: int) -> Worked:
    """Multiply two non-negative integers, the shorter below 100, by partial products.

    Args:
        a: first factor.
        b: second factor; if it has more digits than ``a``, the factors change places first.

    Returns:
        The products with the ones and the tens of the shorter factor, their sum, and the result.

    Raises:
        ValueError: if both factors are 100 or more.
    """
    if len(str(b)) > len(str(a)):
        turned = multiply(b, a)
        return Worked(turned.value, (f"{a}*{b}={b}*{a}", *turned.lines, f"{a}*{b}={turned.value}"))
    if b >= 100:
        raise ValueError(f"factors {a} and {b}: one of them must be below 100; use smaller numbers")
    if b < 10:
        return _times_digit(a, b)
    tens, ones = divmod(b, 10)
    high = _times_digit(a, tens)
    high_lines = (*high.lines, f"{a}*{tens * 10}={high.value * 10}")
    if ones == 0:
        return Worked(high.value * 10, high_lines)
    low = _times_digit(a, ones)
    total = add(low.value, high.value * 10)
    lines = (f"{b}={tens * 10}+{ones}", *low.lines, *high_lines, *total.lines, f"{a}*{b}={total.value}")
    return Worked(total.value, lines)


def divide(a: int, b: int) -> Worked:
    """Divide exactly, from the times table.

    Raises:
        ValueError: if ``b`` is zero or does not divide ``a``.
    """
    if b == 0 or a % b:
        raise ValueError(f"{a}/{b} is not a whole number; choose a multiple of the divisor")
    divisor = str(b) if b > 0 else f"({b})"
    return Worked(a // b, (f"{a}/{divisor}={a // b}",))
