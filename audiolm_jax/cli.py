"""`audiolm COMMAND`: parses, calls one function, reports errors; no logic.

The commands themselves are in `options`; their heavy imports happen inside them, so that `--help` answers at once.
"""

import argparse
import errno
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from audiolm_jax import __version__, huge_pages
from audiolm_jax.errors import UserError
from audiolm_jax.options import data, models, training

# Failures of the machine's storage that the user can do something about.
STORAGE_ERRORS = {
    errno.ENOSPC: "free some space or choose another folder",
    errno.EDQUOT: "free some space or choose another folder",
    errno.EFBIG: "the file system or a limit refuses a file of that size",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a folder that can be written to",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
    errno.EEXIST: "check the path",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class _Parser(argparse.ArgumentParser):
    """Argument errors in the project's one-line form."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message, self.prog, f"see `{self.prog} --help`")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs one command (by default the program's own) and exits with the contract's status."""
    is_program = arguments is None
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    try:
        sys.exit(_run(arguments, is_program))
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        os._exit(1)
    except UserError as error:
        if debug:
            traceback.print_exc()
        _fail(f"error: {error}", error.status)
    except Exception as error:
        advice = _storage_advice(error)
        if advice is None or debug:
            traceback.print_exc()
        if advice is None:
            _fail(f"error: {type(error).__name__}: {_one_line(error)}; this is a bug, please report it", 1)
        _fail(f"error: {advice}", 2)


def _storage_advice(error: Exception) -> str | None:
    """WHAT: WHERE; WHAT TO DO for a full disk or a forbidden path, whoever raised it; None for anything else."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in STORAGE_ERRORS:
            return f"{cause.strerror}: {cause.filename or 'output'}; {STORAGE_ERRORS[cause.errno]}"
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            if os.strerror(number).lower() in str(cause).lower():
                return f"{os.strerror(number)}: {_one_line(cause)[:200]}; {STORAGE_ERRORS[number]}"
        cause = cause.__cause__ or cause.__context__
    return None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _fail(message: str, status: int) -> NoReturn:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def _quiet_libraries():
    """Storage libraries log a failed write with its traceback, from several threads; `main` reports it once."""
    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.FATAL)
    # Of writes that failed at the same time asyncio reports all but the first when it throws them away.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = lambda _: None


def _run(arguments: list[str], is_program: bool) -> int:
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not debug:
        _quiet_libraries()
    parser = _build_parser()
    options, rest = parser.parse_known_args(arguments)
    unknown = [r for r in rest if not (options.takes_overrides and r.startswith("--config."))]
    if unknown:
        raise UserError("unknown argument", unknown[0], f"see `audiolm {options.command} --help`")
    if is_program:
        huge_pages.restart_with_them()
    return options.function(options, rest) or 0


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="audiolm",
        description="AudioLM in JAX: train its parts, put them together, continue audio. No text, only audio.",
        epilog="Begin with `audiolm quickstart --workdir=runs/quickstart`. Every command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"audiolm_jax {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, function, summary: str, details: str = "", takes_overrides: bool = False):
        added = commands.add_parser(
            name,
            help=summary,
            description=f"{summary}\n\n{details}".strip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.set_defaults(function=function, takes_overrides=takes_overrides)
        added.add_argument("--debug", action="store_true", help="show the traceback of an error")
        return added

    for room in (training, data, models):
        room.add_commands(command)
    return parser
