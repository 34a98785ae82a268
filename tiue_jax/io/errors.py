"""What a command says when it cannot go on, and the exit code it says it with.

One line on standard error, `error: FILE:line [key]: what, expected X, found Y`, and then:

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | a failure while running (`RunError`, a full disk or device, a number that is not finite) |
| 2 | the input is wrong: a flag, a config, a file (`InputError`) |
| 75 | stopped from outside after saving; the same command again goes on (`Preempted`) |

Any other exception is a mistake of ours and keeps its traceback.
"""

from __future__ import annotations

import inspect
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import flags
from absl import logging as absl_logging

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_INPUT = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

_FULL = "RESOURCE_EXHAUSTED"  # how JAX begins to say that a device has no memory left
_LESS_MEMORY = (
    "a smaller --batch_size needs less; in training a larger train.accumulate or mesh.fsdp, "
    "train.remat=blocks or a smaller train.batch_size"
)

Main = Callable[[Sequence[str]], int | None]


class InputError(Exception):
    """The user's input is wrong, and the message says where and how.

    Args:
        what: what is wrong, in a few words ("missing keys", "not a PNG file").
        file: the file or folder that holds the fault.
        line: line number in `file`, from 1.
        key: the field, parameter name or flag at fault.
        expected: what would have been right; any object, shown with `str`.
        found: what is there instead; any object, shown with `str`.
    """

    def __init__(
        self,
        what: str,
        *,
        file: str | os.PathLike[str] | None = None,
        line: int | None = None,
        key: str | None = None,
        expected: object = None,
        found: object = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.file = None if file is None else os.fspath(file)
        self.line = line
        self.key = key
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        """Return `FILE:line [key]: what, expected X, found Y`, without the parts that are None."""
        place = self.file or ""
        if self.line is not None:
            place += f":{self.line}" if place else f"line {self.line}"
        if self.key is not None:
            place += f" [{self.key}]" if place else f"[{self.key}]"
        text = f"{place}: {self.what}" if place else self.what
        if self.expected is not None:
            text += f", expected {self.expected}"
        if self.found is not None:
            text += f", found {self.found}"
        return text


class RunError(Exception):
    """A failure while running that no change of the input would have been told by beforehand."""


class Preempted(Exception):
    """The run was told to stop and has saved; the same command again resumes it."""


def one_line(text: str) -> str:
    """Return `text` on one line: line ends become spaces, other control characters escapes.

    File names and file contents reach error messages; none may break the line or drive a terminal.
    """
    joined = " ".join(part.strip() for part in text.splitlines() if part.strip())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in joined)


def run_command(main: Main, argv: Sequence[str] | None = None) -> NoReturn:
    """Parse absl's flags, run `main` and exit the process by the error contract.

    Args:
        main: takes the arguments that are left after the flags, program name first; returns an exit
            code, or None for 0. `--help` prints the docstring of its module above the flags.
        argv: the command line, program name first; `sys.argv` by default.

    Raises:
        SystemExit: always, with one of the codes of this module.
    """
    argv = list(sys.argv if argv is None else argv)
    sys.unraisablehook = _tell_unraisable
    try:
        code = _run(main, argv)
    except BaseException as error:
        told = describe(error)
        if told is None:
            raise
        code = _say(told[1], told[0])
    sys.exit(code)


def describe(error: BaseException) -> tuple[int, str] | None:
    """Return the exit code and the message of an exception; None for a mistake of ours."""
    match error:
        case InputError():
            return EXIT_INPUT, str(error)
        case RunError() | FloatingPointError():
            return EXIT_FAILED, str(error) or type(error).__name__
        case Preempted():
            return EXIT_PREEMPTED, str(error) or "stopped; run the same command again to go on"
        case OSError():
            return EXIT_FAILED, _describe_os_error(error)
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, "interrupted"
    if type(error).__name__ == "JaxRuntimeError" and _FULL in str(error):  # no import of JAX here
        text = one_line(str(error).partition(_FULL)[2])[:300].strip(": .")
        return EXIT_FAILED, f"a device has too little memory: {text}; {_LESS_MEMORY}"
    return None


def _tell_unraisable(found: sys.UnraisableHookArgs) -> None:
    """Say in a line what a library's callback raised, once.

    tensorstore's threads come here by the hundred after a write has failed, and what Python prints
    for each would stand in the middle of the line that says what failed.
    """
    text = one_line(f"{found.exc_type.__name__}: {found.exc_value}")
    absl_logging.log_first_n(absl_logging.WARNING, "ignored in a callback: %s", 1, text)


def _run(main: Main, argv: list[str]) -> int:
    """Parse the flags, answer `--help` or call `main`; return its exit code."""
    if any(arg in ("--help", "-help", "-h", "--h") for arg in argv[1:]):
        print(_help_text(main, argv[0]))
        return EXIT_DONE
    rest = _parse_flags(argv)
    absl_logging.use_absl_handler()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file name may be of any bytes
        sys.stdout.reconfigure(errors="backslashreplace")
    code = main(rest)
    return EXIT_DONE if code is None else code


def _parse_flags(argv: list[str]) -> list[str]:
    """Parse `argv` into `absl.flags.FLAGS`; every fault, of a config too, is an InputError.

    ml_collections' config flags load and override a config while they are parsed. They raise
    whatever the config raises, and hide a config that is not there until it is first used.
    """
    sys.argv = argv  # where config flags look for the overrides
    try:
        rest = list(flags.FLAGS(argv))
        for name in flags.FLAGS:
            flag = flags.FLAGS[name]
            if (
                flag.present
                and hasattr(flag, "config_filename")
                and not hasattr(flag.value, "lock")  # raises OSError if it was not loaded
            ):
                raise InputError(
                    "get_config returns no config",
                    file=flag.config_filename,
                    key=f"--{name}",
                    expected="an ml_collections.ConfigDict",
                    found=type(flag.value).__name__,
                )
        return rest
    except InputError:
        raise
    except flags.Error as error:
        if "Traceback" in str(error):  # a config that raises ValueError or TypeError
            raise InputError(_last_line(error), key="--config") from error
        raise _flag_error(str(error)) from error
    except OSError as error:
        raise InputError(_last_line(error), key="--config") from error
    except Exception as error:
        raise _config_error(argv, error) from error


def _flag_error(text: str) -> InputError:
    """Turn absl's `flag --NAME=VALUE: reason` into our form; other texts stay as they are."""
    split = re.fullmatch(r"flag --([\w.\-]+)=(.*?): (.*)", text, re.DOTALL)
    if not split:
        return InputError(f"{text.rstrip(' ?.')}; --help lists the flags")
    name, value, reason = split.groups()
    if value == "None":
        return InputError("is required", key=f"--{name}")
    return InputError(reason.rstrip("."), key=f"--{name}", found=repr(value))


def _config_error(argv: list[str], error: Exception) -> InputError:
    """Say where a config file failed, or which override names a key that the config has not."""
    if isinstance(error, SyntaxError):
        return InputError(f"SyntaxError: {error.msg}", file=error.filename, line=error.lineno)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, AttributeError | KeyError) and "ml_collections" in frame.filename:
        missing = str(error).strip("'\"")
        given = [arg.partition("=")[0] for arg in argv[1:] if arg.startswith("--")]
        named = [name for name in given if missing in name.split(".")[1:]]
        if named:
            return InputError("no such config key", key=named[0])
        return InputError(missing, key="--config")
    what = f"{type(error).__name__}: {_last_line(error)}"
    return InputError(what, file=frame.filename, line=frame.lineno)


def _last_line(error: Exception) -> str:
    """Return the last line of an error's text: if it holds a traceback, that says most."""
    text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^\[Errno \d+\] ", "", lines[-1]) if lines else type(error).__name__


def _help_text(main: Main, program: str) -> str:
    """Return the docstring of `main`'s module followed by the flags that this module defines."""
    module = inspect.getmodule(main)
    name = "__main__" if module is None else module.__name__
    text = inspect.getdoc(module) or inspect.getdoc(main) or ""
    listed = flags.FLAGS.module_help(program if name == "__main__" else name)
    return f"{text}\n\nFlags:\n{listed}".rstrip()


def _describe_os_error(error: OSError) -> str:
    """Return `FILE: reason` for an error of the operating system."""
    reason = error.strerror or str(error) or type(error).__name__
    return f"{error.filename}: {reason}" if error.filename else reason


def _say(message: str, code: int) -> int:
    """Print the one line and return `code`."""
    sys.stdout.flush()
    print(f"error: {one_line(message)}", file=sys.stderr, flush=True)
    return code
