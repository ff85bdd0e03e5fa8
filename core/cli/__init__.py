"""The command line `qwen-rt`: one module a command, each with `add_arguments` and `run`.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failure (a verification out of tolerance
too), 2 usage, 130 interrupted. Errors are one line; `--debug` adds the traceback.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from qwen_rt._version import __version__
from qwen_rt.errors import MissingDependencyError, QwenRtError, StorageError, UsageError

__all__ = ["main"]

COMMANDS = ("demo", "doctor", "export", "build", "generate", "chat", "verify", "eval", "inspect", "profile", "bench")

_EXTRAS = {
    "torch": "export",
    "onnxscript": "export",
    "onnx_ir": "export",
    "ml_dtypes": "export",
    "transformers": "bench",
    "safetensors": "bench",
    "matplotlib": "bench",
    "math_verify": "eval",
}
_REQUIRED = ("jinja2", "numpy", "onnx", "onnxruntime", "tokenizers", "tqdm")

_DESCRIPTION = """\
Compile Qwen2, Qwen2-Math and Qwen2.5 checkpoints into deployment bundles, and run them.

The way of a model:  checkpoint --build--> bundle --generate--> text
"""

_EPILOG = """\
example:
  qwen-rt build nano -o nano-cpu
  qwen-rt generate nano-cpu --boxed "What is 123 * 45?"

`nano` is a small trained checkpoint that ships with qwen-rt; it stands wherever a checkpoint is named.
`qwen-rt COMMAND --help` explains a command.
"""


class _Parser(argparse.ArgumentParser):
    """argparse with usage errors as one line and near matches for a mistyped command."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print in several lines."""
        if "invalid choice" in message and "(choose from" in message:
            message = message.replace("(choose from", "(one of")
            typed = message.partition("'")[2].partition("'")[0]  # nothing where a number was typed
            near = difflib.get_close_matches(typed, COMMANDS, n=1)
            message += f"; did you mean {near[0]}?" if near else ""
        raise UsageError(message, fix=f"see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `qwen-rt` with `argv` (default: the process's arguments) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: text that the terminal cannot show
        try:
            return _run(arguments)
        finally:
            if sys.exc_info()[0] in (None, SystemExit):  # what fails is told here, not at the end of the process
                _flush()
    except KeyboardInterrupt:
        print("\nqwen-rt: interrupted" if _on_terminal() else "qwen-rt: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone: nobody to tell
        _drop_output()
        return 1
    except (QwenRtError, ModuleNotFoundError, OSError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        known = _as_known(error)
        print(f"qwen-rt: error: {known}", file=sys.stderr)
        _drop_output()
        return known.exit_code


def _run(arguments: Sequence[str]) -> int:
    args = _parse(arguments)
    if args.command is None:
        _parser().print_help()
        return 0
    return int(importlib.import_module(f"qwen_rt.cli.{args.command}").run(args))


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _drop_output() -> None:
    """Write out what stdout still holds; where that fails, forget it, or Python complains when the process ends."""
    try:
        _flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; an optional positional may also stand behind the options, where argparse does not look for it."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    escaped = rest[:1] == ["--"]
    missing = next((name for name in ("prompt", "bundle") if getattr(args, name, "") is None), None)
    if len(rest) == 1 + escaped and (escaped or not rest[0].startswith("-")) and missing is not None:
        setattr(args, missing, rest[-1])
    elif rest:
        command = parser.prog if args.command is None else f"{parser.prog} {args.command}"
        raise UsageError(f"unrecognized arguments: {' '.join(rest)}", fix=f"see {command} --help")
    return args


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qwen-rt",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"qwen-rt {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name in COMMANDS:
        module = importlib.import_module(f"qwen_rt.cli.{name}")
        command = subparsers.add_parser(
            name,
            help=module.HELP,
            description=str(module.__doc__).strip(),
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.add_arguments(command)
    return parser


def _as_known(error: QwenRtError | ModuleNotFoundError | OSError | MemoryError) -> QwenRtError:
    """Turn what Python raised into one of our one-line errors."""
    if isinstance(error, QwenRtError):
        return error
    if isinstance(error, ModuleNotFoundError):
        return _missing(error)
    if isinstance(error, MemoryError):
        return QwenRtError(f"not enough memory: {error}", fix="lower --max-length or --batch, or free some memory")
    reason = error.strerror or str(error)
    where = f"{error.filename}: " if error.filename is not None else ""
    return StorageError(f"{where}{reason}", fix="check the path and its permissions, or rerun with --debug")


def _missing(error: ModuleNotFoundError) -> QwenRtError:
    """Say which extra brings a package that is not installed."""
    package = str(error.name).split(".")[0]
    if package in _REQUIRED:
        fix = "pip install --force-reinstall qwen-rt"
    elif package in _EXTRAS:
        fix = f'pip install "qwen-rt[{_EXTRAS[package]}]"'
    else:
        raise error
    return MissingDependencyError(f"this command needs {package}, which is not installed", fix=fix)
