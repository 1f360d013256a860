"""``fastdiff COMMAND ...``: finds the command and turns a user's mistake into one line on stderr and exit code 2.

Nothing heavy is imported here, so that ``fastdiff --help`` answers at once; each command is a module with
``run(argv) -> exit code``. An exception that is not explained here is a defect of fastdiff and keeps its traceback.
"""

import errno
import importlib
import sys
from collections.abc import Sequence

from fastdiff._version import __version__
from fastdiff.cli.options import nearest
from fastdiff.errors import UserError

COMMANDS = {
    "distill": "train a student of few steps, save it for plain diffusers, measure it beside its teacher",
    "distill-multi": "train several students, each for a part of the prompts, and save one pipeline that routes to them",
    "plan": "say beforehand what a run takes: bytes, network calls, noise, and whether it fits together",
    "sample": "draw images from a saved pipeline into a grid",
    "eval": "measure pipelines side by side: quality, network calls, latency, memory",
    "certify": "train methods on laws known in closed form until they recover them",
    "methods": "list the distillation methods with their papers",
}
_MODULES = {"eval": "evaluate", "distill-multi": "distill_multi"}
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def usage() -> str:
    """The text of ``fastdiff --help``."""
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: fastdiff COMMAND [OPTIONS]",
            "",
            *(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()),
            "",
            "fastdiff COMMAND --help explains the options of a command. Without any, `fastdiff distill` makes a",
            "one-step generator of the bundled teacher in eight minutes on two cores, with a table and a picture.",
        ]
    )


def explain(error: Exception) -> str | None:
    """One line for what a user can cause and repair; None for everything else."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return " ".join(error.command.split())
    if "No space left on device" in text or (isinstance(error, OSError) and error.errno in _DISK_FULL):
        return f"the disk is full ({text}); what was complete before is kept. Free some space or choose another --output."
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else text
    if type(error).__name__ == "SafetensorError":  # by its name: importing safetensors would not be free
        return f"a safetensors file is damaged or cut off ({text}). Copy or download it again."
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0, 2 for a user's mistake, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in {"-h", "--help"}:
        print(usage())
        return 0
    if words[0] in {"-V", "--version"}:
        print(f"fastdiff {__version__}")
        return 0
    try:
        if words[0] not in COMMANDS:
            raise UserError(f"no command '{words[0]}'{nearest(words[0], COMMANDS)} Commands: {', '.join(COMMANDS)}.")
        command = importlib.import_module(f"fastdiff.cli.{_MODULES.get(words[0], words[0])}")
        return int(command.run(words[1:]))
    except KeyboardInterrupt as interrupt:
        print(f"\nfastdiff: {str(interrupt) or 'stopped'}", file=sys.stderr)
        return 130
    except Exception as error:
        if (message := explain(error)) is None:
            raise
        print(f"fastdiff: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
