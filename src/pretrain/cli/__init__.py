"""The command line: one command a file in `commands`, each with a table of `OPTIONS` and `run`,
which returns an exit code, or None for 0.

`main` imports the file of the command, runs it, and turns errors into exit codes: 0 done; 2 an
error that the user can correct, in one message; 1 a bug, with a traceback; 130, 143, ... stopped by
Ctrl-C, SIGTERM, ..., with everything saved; 75 stopped by a full disk or memory.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from typing import Any, NoReturn

from pretrain import __version__
from pretrain.cli.output import Output
from pretrain.fileio import NO_SPACE
from pretrain.machine import yield_idle_cores
from pretrain.validation import did_you_mean, nearest, suggestion

COMMANDS = {
    "train": "train a model on a recipe, a config file, or any text",
    "extend": "train a finished run for more steps with a schedule that is printed first",
    "anneal": "train a finished run for more steps while its learning rate falls to 0",
    "prepare": "turn text into a prepared folder of token ids",
    "demonstrate": "write a corpus that demonstrates tasks, from articles and translations",
    "tokenizer": "train or inspect a tokenizer, encode, decode",
    "evaluate": "score a model on text (nats, perplexity, bits per byte) and on tasks",
    "compare": "compare models on the same texts or tasks, with interval and p-value",
    "ask": "answer a task with a model, such as a translation or a summary",
    "generate": "continue a prompt",
    "next": "show the distribution over the next token",
    "mix": "average the probabilities of several models: a model like any other",
    "export": "write a model for transformers or llama.cpp, and verify the files",
    "import": "read a model of transformers, llama.cpp or llama2.c",
    "verify": "verify that a resume of a run equals an uninterrupted run",
    "doctor": "check in a minute that this machine repeats, resumes, compiles and saves",
    "report": "write a run's report.html",
    "trace": "list the documents that a step read, or the steps that read a document",
}
_URL = re.compile("[a-z][a-z0-9+.-]+://", re.IGNORECASE)
# Arguments that are text for a model or names of documents, not paths.
_TEXT_ARGS = {"prompt", "input", "answer", "document"}
_NO_COMPILER = {"CppCompileError", "InvalidCxxCompiler"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open until the end
        stream = getattr(sys, name)
        if isinstance(stream, TextIOWrapper):  # a character that a terminal lacks must end no run
            stream.reconfigure(errors="backslashreplace")
    if argv[:1] == ["help"]:  # `pretrain help train`
        argv = [*argv[1:2], "--help"]
    command, *args = argv or ["--help"]
    output = Output(json="--json" in args)
    yield_idle_cores()
    try:
        if command in ("-h", "--help", "--version"):
            print(f"pretrain {__version__}" if command == "--version" else _overview())
            return 0
        module, parsed = _parse(command, args)
        return int(module.run(parsed, output) or 0)
    except SystemExit as stop:  # argparse has printed its help
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        code = int(getattr(stop, "exit_code", 130))
        output.fail(str(stop) or "stopped", code)
        return code
    except BrokenPipeError:  # nobody reads our output any more
        return 1
    except Exception as error:
        code, message = _explain(error)
        if code == 1 and not hasattr(error, "exit_code"):
            with suppress(OSError):
                traceback.print_exc()
        from pretrain.runner.launch import report_to_launcher

        if not report_to_launcher(message):
            output.fail(message, code)
        return code
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # its reader has gone, or its disk is full; Python would complain
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _parse(command: str, args: list[str]) -> tuple[Any, argparse.Namespace]:
    """Return the module of a command, and its arguments."""
    if command not in COMMANDS:
        is_tuning = re.fullmatch("(fine.?)?tun(e|ing)|sft", command)
        tune = "train --train.init_from MODEL TEXT"
        hint = did_you_mean(tune) if is_tuning else suggestion(command, COMMANDS)
        raise ValueError(f"there is no command {command!r}; {hint}")
    # `import` is a keyword, which cannot be the name of a module; two commands share one.
    name = {"import": "importing", "anneal": "extend"}.get(command, command)
    module = import_module(f"pretrain.cli.commands.{name}")
    parser = _Parser(
        prog=f"pretrain {command}",
        usage=getattr(module, "USAGE", None),
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for flag, words in module.OPTIONS:
        parser.add_argument(flag, **words)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; other text goes to stderr"
    )
    overrides: Mapping[str, Mapping[str, Any]] = {}
    if parser.usage:  # the command takes settings
        from pretrain.config import parse_overrides

        others: list[str] = []
        overrides = parse_overrides(args, others=others)
        args = others
        if "-h" in args or "--help" in args:
            parser.epilog = module.epilog()
    parsed = parser.parse_args(args)
    _reject_urls(parsed, overrides)
    parsed.command, parsed.overrides = command, overrides
    return module, parsed


class _Parser(argparse.ArgumentParser):
    """A parser that raises ValueError, so that its errors are printed like all others."""

    def error(self, message: str) -> NoReturn:
        if match := re.match("unrecognized arguments: --([^ =]+)", message):
            from pretrain.config import setting_named

            setting = setting_named(match[1]) if self.usage else None
            close = setting or nearest(match[1], [o[2:] for o in self._option_string_actions])
            if close:
                raise ValueError(f"{message}; {did_you_mean(f'--{close}')} See {self.prog} --help")
        elif re.match("unrecognized arguments: [^-]", message):
            flags = [o for o, action in self._option_string_actions.items() if action.metavar]
            message += f"; a value must follow its option, such as {flags[0]}" if flags else ""
        raise ValueError(f"{message}; see {self.prog} --help")


def _reject_urls(args: argparse.Namespace, overrides: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError for a URL where a path is expected: it would become a strange folder."""
    values = [value for name, value in vars(args).items() if name not in _TEXT_ARGS]
    values += [value for section in overrides.values() for value in section.values()]
    for value in values:
        for path in value if isinstance(value, list) else [value]:
            if _URL.match(str(path)):
                raise ValueError(
                    f"{path} is a URL; files are read from and written to disks only: copy it "
                    "first (aws s3 sync, gcloud storage rsync), or mount it (mountpoint-s3)"
                )


def _overview() -> str:
    rows = "\n".join(f"  {command:<11} {text}" for command, text in COMMANDS.items())
    return (
        "usage: pretrain COMMAND ...\n\nPre-train decoder-only language models on any text, by "
        f"next-token prediction.\n\n{rows}\n\nEvery command has --help and --json. "
        "`pretrain train` alone trains on the bundled corpus."
    )


def _explain(error: BaseException) -> tuple[int, str]:
    """Return the exit code for an error, and the message.

    The code is 2 for what the user can correct, 75 for a full disk or memory, 1 for a bug. A
    ValueError that our own code raised is a message for the user; one from inside a library is a
    bug of ours. A missing compiler is the user's to install.
    """
    message = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        message = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if hasattr(error, "exit_code"):
        return int(error.exit_code), message
    if type(getattr(error, "inner_exception", None)).__name__ in _NO_COMPILER:
        return 2, (
            "torch.compile needs a C++ compiler, in a folder without spaces; install one, or use "
            "--train.compile off"
        )
    if isinstance(error, OSError) and error.errno is not None:  # what the system does not allow
        return 75 if error.errno in NO_SPACE else 2, message
    is_torch_out = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in message
    if isinstance(error, MemoryError) or is_torch_out:
        return 75, f"out of memory: {message}; a smaller model, micro-batch or text needs less"
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    is_ours = innermost.f_globals.get("__name__", "").partition(".")[0] == "pretrain"
    return (2 if isinstance(error, ValueError) and is_ours else 1), message
