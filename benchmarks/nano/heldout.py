"""The 1,000 held-out problems: made from a fixed seed, committed, and kept out of training.

Command line: ``python -m qwen_rt.benchmarks.nano.heldout`` rewrites ``heldout.jsonl`` byte for byte.
"""

import argparse
import json
from functools import cache
from pathlib import Path

from .problems import distinct, normalise

HELDOUT_PATH = Path(__file__).with_name("heldout.jsonl")
HELDOUT_SEED = 1_000_003
NUM_HELDOUT = 1000


def render() -> str:
    """Return the file's text: one JSON object a line with id, kind, question, answer, solution."""
    lines = []
    for number, problem in enumerate(distinct(HELDOUT_SEED, NUM_HELDOUT)):
        row = {
            "id": f"nano-{number:04d}",
            "kind": problem.kind,
            "question": problem.question,
            "answer": problem.answer,
            "solution": problem.solution,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


def load(path: Path = HELDOUT_PATH) -> list[dict[str, str]]:
    """Read the held-out problems."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@cache
def excluded_questions() -> frozenset[str]:
    """Return the normal forms of all held-out questions: none of them may be trained on."""
    return frozenset(normalise(row["question"]) for row in load())


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Write the held-out problems from their seed.")
    parser.add_argument("--output", type=Path, default=HELDOUT_PATH, help="file to write (default: %(default)s)")
    output = parser.parse_args().output
    output.write_text(render(), encoding="utf-8")
    print(f"wrote {NUM_HELDOUT} problems to {output}")


if __name__ == "__main__":
    main()
