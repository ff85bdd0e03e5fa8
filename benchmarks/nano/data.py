"""Training batches, made by worker processes while the model trains.

A step's problems are sorted by length and cut into micro-batches, each right-padded to its longest row: with causal
attention the padding cannot be seen by a real token, so no mask is needed. Worker ``w`` of ``W`` makes steps
``w, w+W, ...`` from its own seed and the trainer takes them in turn, so a seed fixes the order of all batches.
"""

import itertools
import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from tokenizers import Tokenizer

from .base import Draw, Problem
from .heldout import excluded_questions
from .problems import stream
from .prompts import ANSWER_HEADER, IM_END, IM_START, INSTRUCTION, chat_prompt, instruct_prompt

LENGTH_MULTIPLE = 32
BARE_SHARE, SYSTEM_INSTRUCTION_SHARE = 0.15, 0.05
QUEUE_STEPS = 6
SEED_STRIDE = 1_000_003


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one length.

    Attributes:
        input_ids: i64[rows, length], right-padded.
        positions: i64[num_targets], flat positions whose next token the loss is about.
        targets: i64[num_targets], those next tokens.
    """

    input_ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Encoder:
    """Turns problems into token rows.

    Attributes:
        tokenizer: the nano tokenizer.
        pad_id: what rows are padded with.
    """

    tokenizer: Tokenizer
    pad_id: int

    def micro_batch(self, texts: list[str]) -> MicroBatch:
        """Encode prompts with their solutions; only the assistant's tokens become targets."""
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts)]
        return self.pad(rows)

    def pad(self, rows: list[list[int]]) -> MicroBatch:
        """Right-pad rows and find their targets: every token after the last assistant header."""
        im_start = token_id(self.tokenizer, IM_START)
        header_tokens = len(self.tokenizer.encode(ANSWER_HEADER).ids)
        longest = max(map(len, rows))
        length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        input_ids = np.full((len(rows), length), self.pad_id, dtype=np.int64)
        wanted = np.zeros((len(rows), length), dtype=bool)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            answer_start = len(row) - 1 - row[::-1].index(im_start) + header_tokens
            wanted[index, answer_start - 1 : len(row) - 1] = True
        positions = np.flatnonzero(wanted)
        return MicroBatch(input_ids, positions, input_ids.reshape(-1)[positions + 1])


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return a token's id.

    Raises:
        ValueError: if the vocabulary lacks it.
    """
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no token {token!r}; use the nano checkpoint's tokenizer.json")
    return found


def training_text(draw: Draw, problem: Problem) -> str:
    """Return a problem's training text: mostly the Qwen2-Math prompt, sometimes another a user may send."""
    point = draw.unit()
    if point < BARE_SHARE:
        prompt = chat_prompt(problem.question)
    elif point < BARE_SHARE + SYSTEM_INSTRUCTION_SHARE:
        prompt = chat_prompt(problem.question, system=INSTRUCTION)
    else:
        prompt = instruct_prompt(problem.question)
    return prompt + problem.solution + IM_END


def steps(encoder: Encoder, seed: int, num_problems: int, num_micro: int) -> Iterator[list[MicroBatch]]:
    """Yield one worker's steps without end.

    Args:
        encoder: the tokenizer to encode with.
        seed: the worker's seed.
        num_problems: problems a step.
        num_micro: micro-batches a step, of about the same number of tokens.
    """
    draw, problems = Draw(seed + 1), stream(seed, excluded_questions())
    while True:
        texts = [training_text(draw, next(problems)) for _ in range(num_problems)]
        rows = sorted((encoding.ids for encoding in encoder.tokenizer.encode_batch_fast(texts)), key=len)
        edges = np.cumsum([len(row) for row in rows])
        cuts = np.searchsorted(edges, np.arange(1, num_micro) * edges[-1] / num_micro)
        bounds = [0, *cuts.tolist(), num_problems]
        yield [encoder.pad(rows[low:high]) for low, high in itertools.pairwise(bounds) if high > low]


def _work(queue: "multiprocessing.Queue[list[MicroBatch]]", path: Path, pad_id: int, *sizes: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for step in steps(Encoder(Tokenizer.from_file(str(path)), pad_id), *sizes):
        queue.put(step)


class Loader:
    """The worker processes and the queues between them and the trainer; a context manager."""

    def __init__(
        self, tokenizer_path: Path, pad_id: int, seed: int, num_problems: int, num_micro: int, num_workers: int
    ) -> None:
        context = multiprocessing.get_context("fork")
        self._queues = [context.Queue(QUEUE_STEPS) for _ in range(num_workers)]
        self._workers = [
            context.Process(
                target=_work,
                args=(queue, tokenizer_path, pad_id, (seed + 1) * SEED_STRIDE + 2 * number, num_problems, num_micro),
                daemon=True,
            )
            for number, queue in enumerate(self._queues)
        ]
        self._step = 0

    def __enter__(self) -> "Loader":
        for worker in self._workers:
            worker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.terminate()
            worker.join()

    def next_step(self) -> list[MicroBatch]:
        """Return the next step's micro-batches, waiting for the worker whose turn it is."""
        queue = self._queues[self._step % len(self._queues)]
        self._step += 1
        batches: list[MicroBatch] = queue.get()
        return batches
