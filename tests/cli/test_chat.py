"""`qwen-rt chat`, on a terminal and in a pipe; Ctrl-C stops an answer, never the program or its memory."""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pexpect
import pytest

from qwen_rt.cli import chat, main
from qwen_rt.engine_card import ENGINE_TARGETS
from qwen_rt.errors import TextError
from qwen_rt.runtime.llm import LLM
from qwen_rt.runtime.outputs import StreamChunk

from ..runtime.cuda_bundle import as_cuda, install
from .conftest import Cli
from .kit import HOSTILE, QUESTION, child, command, environment

PROMPT = r"\r\n> |^> "
NEVER_ENDS = ["--ignore-eos", "--max-tokens", "1900"]


@pytest.fixture
def terminal(bundle: Path) -> Iterator[Callable[..., Any]]:
    """Start a chat on a terminal; each ends with its test."""
    started: list[Any] = []

    def start(*options: str, folder: Path = bundle) -> Any:
        program, *arguments = command("chat", folder, *options)
        variables = environment(TERM="dumb", PYTHONUNBUFFERED="1")
        talk = pexpect.spawn(program, arguments, env=variables, encoding="utf-8", timeout=60, echo=False)
        started.append(talk)
        talk.expect_exact("Ctrl-C stops an answer.")
        talk.expect("> ")
        return talk

    yield start
    for talk in started:
        talk.close(force=True)


def _code(talk: Any) -> int:
    talk.expect(pexpect.EOF)
    talk.close()
    assert talk.exitstatus is not None, f"killed by signal {talk.signalstatus}"
    return int(talk.exitstatus)


def test_questions_commands_and_exit(terminal: Callable[..., Any]) -> None:
    talk = terminal("--boxed")
    talk.sendline(QUESTION)
    talk.expect_exact("\\boxed{42}")
    talk.expect("> ")
    talk.sendline("/history")
    talk.expect_exact(f"user: {QUESTION}")
    talk.expect_exact("assistant: ")
    talk.expect("\r\n> ")
    talk.sendline("/rest")
    talk.expect_exact("unknown command /rest; /reset, /history or /exit")
    talk.sendline("/reset")
    talk.expect_exact("(conversation forgotten)")
    talk.expect("> ")
    talk.sendline("/history")
    talk.sendline("")
    assert "user:" not in (talk.expect("> "), talk.before)[1]
    talk.sendline("/exit")
    assert _code(talk) == 0


def test_ctrl_d_leaves(terminal: Callable[..., Any]) -> None:
    talk = terminal()
    talk.sendeof()
    assert _code(talk) == 0


def test_ctrl_c_stops_the_answer_and_the_next_question_works(terminal: Callable[..., Any]) -> None:
    talk = terminal(*NEVER_ENDS)
    talk.sendline(QUESTION)
    talk.expect(r"\d")
    talk.sendintr()
    talk.expect_exact("[stopped]")
    talk.expect("> ")
    talk.sendline("/history")
    talk.expect_exact(f"user: {QUESTION}")
    talk.expect(r"assistant: .")
    talk.expect("\r\n> ")
    talk.sendline("/reset")
    talk.expect("> ")
    talk.sendline("What is 3 * 4?")
    talk.expect("12")
    for _ in range(5):  # impatience
        talk.sendintr()
    talk.expect_exact("[stopped]")
    talk.expect("> ")
    talk.sendline("/exit")
    assert _code(talk) == 0


def test_ctrl_c_at_the_prompt_clears_the_line(terminal: Callable[..., Any]) -> None:
    talk = terminal("--max-tokens", "4")
    talk.send("half a questi")
    time.sleep(0.2)
    talk.sendintr()
    talk.expect("> ")
    talk.sendintr()
    talk.expect("> ")
    talk.sendline("/history")
    talk.sendline("/exit")
    assert _code(talk) == 0
    assert "user:" not in talk.before


def test_ctrl_c_at_random_moments(terminal: Callable[..., Any]) -> None:
    """Before the first token, while it streams, twice: the same question still gets the same answer afterwards."""
    talk = terminal("--boxed")
    talk.delaybeforesend = None
    for pause_s in (0.0, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1):
        talk.sendline(QUESTION)
        time.sleep(pause_s)
        talk.sendintr()
        talk.sendintr()
        for _ in range(20):  # what is typed together with Ctrl-C may be lost: terminals drop their input then
            talk.sendline("/reset")
            if talk.expect_exact(["(conversation forgotten)", pexpect.TIMEOUT], timeout=1) == 0:
                break
        talk.expect("> ")
    talk.sendline(QUESTION)
    talk.expect_exact("\\boxed{42}")
    talk.sendline("/exit")
    assert _code(talk) == 0


def test_an_over_long_message_is_told_and_forgotten(terminal: Callable[..., Any]) -> None:
    talk = terminal("--boxed")
    too_long = r"qwen-rt: the prompt has \d+ tokens; expected at most 2047.*/reset starts anew"
    for _ in range(3):  # a terminal line holds 4095 bytes: too long are three of them together
        talk.sendline("1+2+3+4+5+6+7+8+9" * 60)
        # On a line of its own: readline draws "> " while it takes the message, and would not see a Ctrl-C before a key.
        if talk.expect([too_long, r"\r\n> "]) == 0:
            break
        talk.sendintr()
        talk.expect("> ")
    else:
        pytest.fail("no message about the length")
    talk.sendline("/reset")
    talk.expect_exact("(conversation forgotten)")
    talk.sendline(QUESTION)
    talk.expect_exact("\\boxed{42}")
    talk.sendline("/exit")
    assert _code(talk) == 0


def test_piped_input_has_no_prompts(bundle: Path, cli: Cli) -> None:
    llm = LLM(bundle)
    first = llm.chat([{"role": "user", "content": QUESTION}], max_tokens=12).text
    talk = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": first}]
    second = llm.chat([*talk, {"role": "user", "content": "And 2 more?"}], max_tokens=12).text
    result = cli("chat", bundle, "--max-tokens", "12", stdin=f"{QUESTION}\n\n  And 2 more?  \n")
    assert (result.code, result.out, result.err) == (0, f"{first}\n{second}\n", "")
    forgotten = cli("chat", bundle, "--max-tokens", "12", stdin=f"Hi\n/reset\n{QUESTION}\n/exit\nnever read\n")
    assert forgotten.out.endswith(f"\n{first}\n")
    assert forgotten.err == "(conversation forgotten)\n"


def test_piped_trouble(bundle: Path, cli: Cli) -> None:
    long = cli("chat", bundle, "--max-tokens", "3", stdin="1+" * 3000 + f"\n{QUESTION}\n")
    assert long.code == 0
    assert re.fullmatch(r"qwen-rt: the prompt has \d+ tokens; .*; /reset starts anew\n", long.err)
    assert long.out.count("\n") == 1
    odd = cli("chat", bundle, stdin=f"/{HOSTILE.replace(chr(10), '')}\n")
    assert odd.err[:-1].isprintable()
    cli("chat", bundle, stdin=b"caf\xe9\n").refused(2, "the message cannot be read", "expected UTF-8 text")


def test_ctrl_c_in_a_pipe_ends_the_program(bundle: Path) -> None:
    import subprocess

    with subprocess.Popen(
        command("chat", bundle), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(PYTHONUNBUFFERED="1"), text=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("What is 1+1?\n")
        process.stdin.flush()
        assert process.stdout.read(1)  # the program is up; wherever it is now, one or two signals end it
        process.send_signal(signal.SIGINT)
        time.sleep(1.0)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        output, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "qwen-rt: interrupted\n"), output


class _StubLLM:
    """Answers with given pieces; an exception among them is raised where it stands."""

    def __init__(self, *answers: list[str | BaseException]) -> None:
        self.answers = list(answers)
        self.asked: list[list[dict[str, str]]] = []

    def stream(self, messages: list[dict[str, str]], **overrides: Any) -> Iterator[StreamChunk]:
        self.asked.append([dict(message) for message in messages])
        for piece in self.answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            yield StreamChunk(index=0, text=piece, token_id=0, finish_reason=None)


def _converse(llm: _StubLLM, *lines: str, monkeypatch: pytest.MonkeyPatch, interactive: bool, **options: bool) -> int:
    waiting = iter(lines)

    def read(prompt: str = "") -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat, "_interactive", lambda: interactive)
    return chat.converse(llm, None, "", {}, **options)  # type: ignore[arg-type]


def test_what_is_remembered_of_a_stopped_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = _StubLLM([KeyboardInterrupt()], ["so ", "far", KeyboardInterrupt()], ["end"])
    handler = signal.getsignal(signal.SIGINT)
    assert _converse(llm, "one", "two", "three", monkeypatch=monkeypatch, interactive=True) == 0
    assert signal.getsignal(signal.SIGINT) is handler
    said = [[(message["role"], message["content"]) for message in messages] for messages in llm.asked]
    two = [("user", "two"), ("assistant", "so far"), ("user", "three")]
    assert said == [[("user", "one")], [("user", "two")], two], "a message without any answer is taken back"
    assert capsys.readouterr().out == " [stopped]\nso far [stopped]\nend\n"


class _PressingLLM(_StubLLM):
    """Presses Ctrl-C where its answer says so; notes how its stream ended."""

    def __init__(self, *answers: list[str | BaseException]) -> None:
        super().__init__(*answers)
        self.ends: list[str] = []

    def stream(self, messages: list[dict[str, str]], **overrides: Any) -> Iterator[StreamChunk]:
        end = "interrupted"
        try:
            for chunk in super().stream(messages, **overrides):
                if chunk.text == "^C":
                    signal.raise_signal(signal.SIGINT)
                else:
                    yield chunk
            end = "done"
        except GeneratorExit:
            end = "closed"
            raise
        finally:
            self.ends.append(end)


@pytest.mark.parametrize("between_tokens", [False, True])
def test_ctrl_c_may_wait_for_the_end_of_a_step(
    between_tokens: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = _PressingLLM(["^C", "one"], ["so ", "far", "^C", "never", "more"], ["end"])
    assert (
        _converse(llm, "one", "two", "three", monkeypatch=monkeypatch, interactive=True, between_tokens=between_tokens)
        == 0
    )
    assert capsys.readouterr().out == " [stopped]\nso far [stopped]\nend\n"
    assert llm.ends == (["closed", "closed", "done"] if between_tokens else ["interrupted", "interrupted", "done"])


@pytest.mark.parametrize("target", ["cpu", "cuda", *ENGINE_TARGETS])
def test_whatever_runs_on_a_gpu_is_stopped_between_tokens_only(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where steps are captured, an exception in the midst of one would leave the capture open."""
    llm = SimpleNamespace(bundle=SimpleNamespace(manifest=SimpleNamespace(target=target)), generation_config={})
    told: list[bool] = []
    monkeypatch.setattr("qwen_rt.runtime.llm.LLM", lambda *_, **__: contextlib.nullcontext(llm))
    monkeypatch.setattr(chat, "converse", lambda *_, between_tokens: told.append(between_tokens) or 0)
    assert main(["chat", "folder"]) == 0
    assert told == [target != "cpu"]


def test_trouble_with_one_message_does_not_end_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = _StubLLM([TextError("chat template failed: only maths")], ["fine"])
    assert _converse(llm, "a", "b", monkeypatch=monkeypatch, interactive=True) == 0
    assert capsys.readouterr().err == "qwen-rt: chat template failed: only maths\n\n"
    assert len(llm.asked[1]) == 1
    with pytest.raises(TextError):
        _converse(_StubLLM([TextError("no")]), "a", monkeypatch=monkeypatch, interactive=False)


def test_stdin_that_is_closed(bundle: Path) -> None:
    assert child(["chat", bundle], stdin="").code == 0


def test_a_cuda_bundle_holds_a_conversation(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    made = install(monkeypatch)
    folder = as_cuda(bundle, tmp_path / "nano-cuda")
    lines = f"{QUESTION}\nAnd 2 more?\n" + "1+2+3+4+5+6+7+8+9" * 30 + "\n/reset\nWhat is 8 + 8?\n"
    limits = ["--max-tokens", "12"]
    expected = cli("chat", bundle, *limits, stdin=f"{QUESTION}\nAnd 2 more?\n/reset\nWhat is 8 + 8?\n").out
    found = cli("chat", folder, *limits, "--kv-memory", "1MiB", stdin=lines)
    assert (found.code, found.out) == (0, expected)
    told, forgotten = found.err.splitlines()
    assert re.match(r"qwen-rt: request 0 has \d+ prompt tokens and max_tokens=12: \d+ cache blocks; .*/reset", told)
    assert forgotten == "(conversation forgotten)"
    assert [(session.is_closed, session.max_rows) for session in made] == [(True, 1)]
