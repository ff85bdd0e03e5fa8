"""The text the model sees: Qwen2-Math's instruct prompt, and how an answer is read back."""

import re

ENDOFTEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (ENDOFTEXT, IM_START, IM_END)
SYSTEM = "You are a helpful assistant."
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed\s+([^\s\\{}$.,;]+)")
ANSWER_HEADER = f"{IM_START}assistant\n"


def chat_prompt(user: str, system: str = SYSTEM) -> str:
    """Return what the chat template makes of one user message, ready for the assistant's turn."""
    return f"{IM_START}system\n{system}{IM_END}\n{IM_START}user\n{user}{IM_END}\n{ANSWER_HEADER}"


def instruct_prompt(question: str) -> str:
    """Return the Qwen2-Math instruct prompt of a question."""
    return chat_prompt(f"{question}\n{INSTRUCTION}")


def boxed_content(text: str) -> str | None:
    r"""Return the content of the last closed ``\boxed{...}`` (or ``\fbox{...}``), of nested ones the inner; else None.

    Braces inside may nest, escaped ones (``\{``) do not count. Where no box has braces, ``\boxed 5`` gives ``5``, as
    TeX reads it. One pass over the text, however many boxes were opened and never closed.
    """
    found, last = None, -1
    opened: list[tuple[int, bool]] = []  # where the content begins, and whether it is a box
    for token in _BRACE.finditer(text):
        if token[0] == "}":
            start, is_box = opened.pop() if opened else (0, False)
            if is_box and start > last:
                found, last = text[start : token.start()], start
        elif token[0].endswith("{") and token[0] != r"\{":
            opened.append((token.end(), len(token[0]) > 1))
    if found is None and (bare := _BARE_BOX.findall(text)):
        return str(bare[-1])
    return found


def boxed_answer(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` without white space, or None if there is none."""
    found = boxed_content(text)
    return None if found is None else "".join(found.split())
