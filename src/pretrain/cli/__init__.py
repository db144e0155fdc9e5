"""The command line: one verb a file in `verbs`, each thin, and beside them what several share.
`main` finds the verb, runs it, and turns errors into exit codes.

0 done; 2 the user's mistake, in a sentence; 1 ours, with a traceback; 130 and 143 stopped by a
signal with everything saved; 75 stopped by a full disk. Only the chosen verb's file is imported, so
`--help` is quick.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper
from types import TracebackType
from typing import NoReturn

from pretrain import __version__
from pretrain.cli.output import Output
from pretrain.distributed import yield_idle_cores

VERBS = {
    "train": "train a model on a recipe, a config file, or any text",
    "extend": "make more steps with a finished run, under a schedule that is printed first",
    "anneal": "make more steps with a finished run while its learning rate falls to 0",
    "prepare": "turn text into a prepared folder of token ids",
    "demonstrate": "write a corpus that shows tasks, from articles and aligned sentences",
    "tokenizer": "train a tokenizer, encode, decode, or look inside one",
    "evaluate": "nats, perplexity and bits per byte of a model on text, and tasks",
    "compare": "models on the same texts or tasks, with interval and p-value",
    "ask": "an answer to a task, such as a translation or a summary",
    "generate": "continue a prompt",
    "next": "the distribution over the next token",
    "export": "write a model for transformers or llama.cpp, with a certificate",
    "import": "read a model of transformers, llama.cpp or llama2.c",
    "verify": "prove that a resume of a run equals an uninterrupted run",
    "doctor": "check this machine in a minute: repeats, resumes, compiles, saves",
    "report": "write a run's report.html",
    "trace": "which documents a step saw, and which steps saw a document",
}
_ADDRESS = re.compile("[a-z][a-z0-9+.-]+://", re.IGNORECASE)
# What is said to a model, and names of documents; not where something lies.
_SAID = {"prompt", "input", "answer", "document"}
_NO_COMPILER = {"CppCompileError", "InvalidCxxCompiler"}
_NO_ROOM = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.ENOMEM}
_USERS_ERRNO = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOENT,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # what a terminal cannot show must end no run
            stream.reconfigure(errors="backslashreplace")
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        print(f"pretrain {__version__}")
        return 0
    verb, rest = words[0], words[1:]
    output = Output(json="--json" in rest)
    if verb not in VERBS:
        output.fail(f"there is no verb {verb!r}; there are: {', '.join(VERBS)}", 2)
        return 2
    yield_idle_cores()
    # A module cannot be called as Python's own word is.
    module = import_module(f"pretrain.cli.verbs.{'importing' if verb == 'import' else verb}")
    parser = _Parser(
        prog=f"pretrain {verb}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_arguments(parser)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; text for people goes to stderr"
    )
    if hasattr(module, "epilog") and {"-h", "--help"} & {*rest}:
        parser.epilog = module.epilog()
    settings, rest = take_settings(rest) if hasattr(module, "TAKES_SETTINGS") else ([], rest)
    try:
        arguments = parser.parse_args(rest)
        arguments.settings = settings
        _refuse_addresses(arguments)
        return int(module.run(arguments, output))
    except SystemExit as stop:  # argparse has shown its help
        return int(stop.code or 0)
    except KeyboardInterrupt as stop:
        code = getattr(stop, "exit_code", 130)
        output.fail(str(stop) or "stopped", code)
        return int(code)
    except BrokenPipeError:
        # The reader of our output has gone; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        code = exit_code(error)
        if code == 1 and not hasattr(error, "exit_code"):
            traceback.print_exc()
        from pretrain.runner.launch import report_to_launcher

        if not report_to_launcher(explain(error)):
            output.fail(explain(error), code)
        return code


class _Parser(argparse.ArgumentParser):
    """One whose refusals are said as all others are."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def take_settings(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate `--section.key value` and `--section.key=value` from the verb's own arguments."""
    settings: list[str] = []
    rest = list(words)
    kept: list[str] = []
    while rest:
        word = rest.pop(0)
        if not (word.startswith("--") and "." in word.partition("=")[0]):
            kept.append(word)
            continue
        settings.append(word)
        if "=" not in word and rest:
            settings.append(rest.pop(0))
    return settings, kept


def _refuse_addresses(arguments: argparse.Namespace) -> None:
    """ValueError for a file or folder that lies on no disk: its path would be another's."""
    for name, value in vars(arguments).items():
        for word in map(str, value if isinstance(value, list) else [value]):
            place = word.partition("=")[2] if word.startswith("--") else word
            if name not in _SAID and _ADDRESS.match(place):
                raise ValueError(
                    f"{place} is an address, and files are read from disks and written to them; "
                    "copy it first (aws s3 sync, gcloud storage rsync), or mount it (mountpoint-s3)"
                )


def _overview() -> str:
    rows = "\n".join(f"  {verb:<11} {text}" for verb, text in VERBS.items())
    return (
        "usage: pretrain VERB ...\n\nPre-train decoder-only language models on any text, by "
        f"next-token prediction.\n\n{rows}\n\nEvery verb takes --help and --json. "
        "`pretrain train` alone trains on the bundled corpus."
    )


def exit_code(error: BaseException) -> int:
    """2 for what the user can mend, 75 for a full disk or memory, 1 for our own mistakes.

    A ValueError that our own code raised is a sentence for the user; one from inside a library is a
    bug of ours. What torch's compiler lacks is the machine's.
    """
    if hasattr(error, "exit_code"):
        return int(error.exit_code)
    if type(getattr(error, "inner_exception", None)).__name__ in _NO_COMPILER:
        return 2
    if isinstance(error, OSError):
        if error.errno in _NO_ROOM:
            return 75
        return 2 if error.errno in _USERS_ERRNO else 1
    return 2 if isinstance(error, ValueError) and _is_ours(error.__traceback__) else 1


def _is_ours(trace: TracebackType | None) -> bool:
    name = ""
    while trace is not None:
        name = trace.tb_frame.f_globals.get("__name__", "")
        trace = trace.tb_next
    return name == "pretrain" or name.startswith("pretrain.")


def explain(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    if type(getattr(error, "inner_exception", None)).__name__ in _NO_COMPILER:
        return "torch.compile lacks a C++ compiler, or its folder has a space: --train.compile off"
    return str(error) or type(error).__name__
