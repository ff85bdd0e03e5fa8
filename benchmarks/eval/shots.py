r"""Worked examples for base models, written for this project: question and answer, the way a prompt shows them."""

from __future__ import annotations

from collections.abc import Mapping

from qwen_rt.benchmarks.eval.datasets import Style

__all__ = ["SHOTS"]

_WORDS = (
    (
        "A baker fills 6 trays with 12 rolls each and sells 50 of the rolls. How many rolls are left?",
        "The 6 trays hold 6 * 12 = 72 rolls. After 50 are sold, 72 - 50 = 22 are left. The answer is 22.",
    ),
    (
        "Nora reads 15 pages of her book on Monday and twice as many on Tuesday. The book has 100 pages. How many "
        "pages does she still have to read?",
        "On Tuesday she reads 2 * 15 = 30 pages, so 15 + 30 = 45 pages in two days. There remain 100 - 45 = 55 pages. "
        "The answer is 55.",
    ),
    (
        "A bus sets out with 18 passengers. At the first stop 7 get off and 12 get on, at the second stop 5 get off. "
        "How many passengers are on the bus now?",
        "After the first stop there are 18 - 7 + 12 = 23 passengers. After the second stop there are 23 - 5 = 18. The "
        "answer is 18.",
    ),
    (
        "A ticket costs $8 for an adult and half as much for a child. What do 2 adults and 3 children pay together?",
        "A child pays 8 / 2 = 4 dollars. The adults pay 2 * 8 = 16 dollars and the children 3 * 4 = 12 dollars. "
        "Together that is 16 + 12 = 28 dollars. The answer is 28.",
    ),
    (
        "Ivan has saved $40 and puts aside $25 every week. How many weeks until he can buy a bike of $240?",
        "He lacks 240 - 40 = 200 dollars. At 25 dollars a week that takes 200 / 25 = 8 weeks. The answer is 8.",
    ),
    (
        "A tank for 90 litres is one third full. A pump adds 5 litres a minute. After how many minutes is it full?",
        "There are 90 / 3 = 30 litres in the tank, so 90 - 30 = 60 litres are missing. The pump needs 60 / 5 = 12 "
        "minutes. The answer is 12.",
    ),
    (
        "75% of the 32 pupils of a class play a sport, 10 of these play football. How many play another sport?",
        "32 * 75 / 100 = 24 pupils play a sport. Of these 24 - 10 = 14 play another sport than football. The answer "
        "is 14.",
    ),
    (
        "A rope of 5 metres is cut into pieces of 20 centimetres, and 4 pieces get lost. How many pieces remain?",
        "5 metres are 5 * 100 = 500 centimetres, which makes 500 / 20 = 25 pieces. Without the lost ones 25 - 4 = 21 "
        "remain. The answer is 21.",
    ),
)

_MATH = (
    (
        r"Solve $\frac{2x-1}{3}=5$ for $x$.",
        r"Multiplying by $3$ gives $2x-1=15$. Hence $2x=16$ and $x=8$. The answer is $\boxed{8}$.",
    ),
    (
        r"An integer from $1$ to $12$ is drawn at random. What is the probability that $3$ or $4$ divides it?",
        r"The multiples of $3$ are $3,6,9,12$, those of $4$ are $4,8,12$. The number $12$ is in both lists, so "
        r"$4+3-1=6$ of the $12$ numbers qualify. The probability is $\frac{6}{12}=\frac{1}{2}$. The answer is "
        r"$\boxed{\frac{1}{2}}$.",
    ),
    (
        r"Find all real numbers $x$ with $x^2-4x\le 5$. Write the answer as an interval.",
        r"The inequality is $x^2-4x-5\le 0$, that is $(x-5)(x+1)\le 0$. A product is not positive exactly where its "
        r"factors differ in sign or one is zero, so $-1\le x\le 5$. The answer is $\boxed{[-1,5]}$.",
    ),
    (
        r"The legs of a right triangle have lengths $2$ and $4$. How long is the altitude to the hypotenuse?",
        r"The hypotenuse has length $\sqrt{2^2+4^2}=\sqrt{20}=2\sqrt{5}$. Twice the area is $2\cdot 4=8$, and also "
        r"the hypotenuse times the altitude, so the altitude is $\frac{8}{2\sqrt{5}}=\frac{4\sqrt{5}}{5}$. The answer "
        r"is $\boxed{\frac{4\sqrt{5}}{5}}$.",
    ),
)

SHOTS: Mapping[Style, tuple[tuple[str, str], ...]] = {"words": _WORDS, "math": _MATH}
"""Style of a dataset → examples, in the order in which they are used."""
