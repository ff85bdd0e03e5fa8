"""The text that a build's gate and `qwen-rt verify` read unless told otherwise: maths, code, three languages."""

from __future__ import annotations

__all__ = ["VERIFICATION_TEXT"]

VERIFICATION_TEXT = """\
A farmer has 48 apples and sells a third of them on Monday. On Tuesday she sells half of what is left.
How many apples does she keep? First find a third of 48: 48 / 3 = 16, so 48 - 16 = 32 apples stay on Monday.
Half of 32 is 16, so she keeps 16 apples. The answer is \\boxed{16}.

To solve 3x + 5 = 20, subtract 5 from both sides: 3x = 15. Divide by 3: x = 5. Check: 3 * 5 + 5 = 20.
A rectangle of sides 7 and 12 has area 7 * 12 = 84 and perimeter 2 * (7 + 12) = 38.
Let f(n) = n^2 + 1 for every integer n. Then f(2) = 5, f(3) = 10, and f(f(1)) = f(2) = 5.
def gcd(a, b): return a if b == 0 else gcd(b, a % b)
Das Quadrat der Zahl 15 ist 225. Le carré de 12 est 144. 三乘以七等于二十一。
"""
