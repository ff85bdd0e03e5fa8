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
ANSWER_HEADER = f"{IM_START}assistant\n"


def chat_prompt(user: str, system: str = SYSTEM) -> str:
    """Return what the chat template makes of one user message, ready for the assistant's turn."""
    return f"{IM_START}system\n{system}{IM_END}\n{IM_START}user\n{user}{IM_END}\n{ANSWER_HEADER}"


def instruct_prompt(question: str) -> str:
    """Return the Qwen2-Math instruct prompt of a question."""
    return chat_prompt(f"{question}\n{INSTRUCTION}")


def boxed_answer(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` without white space, or None if there is none."""
    found = re.findall(r"\\boxed\{([^{}]*)\}", text)
    return "".join(found[-1].split()) if found else None
