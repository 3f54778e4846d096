"""Which command: run (the default), fetch, list, doctor, report, train_head, quantize, eval."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from workbench.cli.output import print_document
from workbench.core.errors import UnsupportedError, WorkbenchError, unknown_name

OK, GATE_FAILED, WRONG_COMMAND, INTERRUPTED = 0, 1, 2, 130

USAGE = """\
python -m workbench [+technique=NAME | +technique=[A,B]] [key=value ...]   measure, side by side
python -m workbench fetch NAME | --list     get a model
python -m workbench list                    techniques: slots, requirements, losslessness, paper
python -m workbench doctor                  what this machine can run, and its ceilings
python -m workbench report FILE.jsonl       draw the figure of recorded runs again; or latest
python -m workbench report --timeline FILE  where its steps' time went; --trace OUT.json
python -m workbench report --memory FILE    where its bytes lie, predicted and measured
python -m workbench train_head kind=NAME    train a draft head on text that the model writes itself
python -m workbench quantize quantizer=NAME scheme=NAME   a checkpoint in 4 or 8 bits
python -m workbench eval [+technique=NAME]  perplexity, and KL divergence from the engine without it
python -m workbench -m +technique=A,B ...   a Hydra sweep
python -m workbench --cfg [key=value ...]   the composed configuration, without running it

Add output=json to any command for one JSON document on stdout.
Exit status: 0 all gates passed, 1 a gate failed, 2 the command was wrong.
Groups: workload=chat|code_edit|summarize|mixed|nano256|..., load=closed|offline, model=NAME,
preset=core|full, engine/<slot>=<option>; see conf/ and README.md.
"""


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit status."""
    arguments = list(arguments)
    try:
        return _dispatch(arguments)
    except WorkbenchError as error:
        return _fail(arguments, str(error), WRONG_COMMAND)
    except KeyboardInterrupt:
        return _fail(arguments, "interrupted; records written so far are kept", INTERRUPTED)


def _dispatch(arguments: list[str]) -> int:
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help", "help"):
        print(USAGE, end="")
        return OK
    if any(text in ("-m", "--multirun") for text in arguments):
        from workbench.cli.sweep import sweep_command

        return sweep_command(arguments)
    if first in _COMMANDS:
        return _COMMANDS[first](arguments[1:])
    if first and "=" not in first and not first.startswith("-"):
        raise unknown_name("command", first, [*_COMMANDS, "(none: measure)"])
    if first == "--cfg":
        from workbench.cli.inspect import config_command

        return config_command(arguments[1:])
    unknown = [text for text in arguments if text.startswith("-")]
    if unknown:
        raise unknown_name("option", unknown[0], ["-m", "--multirun", "--cfg", "--help"])
    from workbench.cli.run import run_command

    return run_command(arguments)


def _fetch(arguments: list[str]) -> int:
    from workbench.models.store import fetch_command

    return fetch_command(arguments)


def _list(arguments: list[str]) -> int:
    from workbench.cli.inspect import list_command

    return list_command(arguments)


def _quantize(arguments: list[str]) -> int:
    from workbench.cli.quantize import quantize_command

    return quantize_command(arguments)


def _doctor(arguments: list[str]) -> int:
    from workbench.cli.inspect import doctor_command

    return doctor_command(arguments)


def _report(arguments: list[str]) -> int:
    from workbench.cli.report import report_command

    return report_command(arguments)


def _train_head(arguments: list[str]) -> int:
    from workbench.cli.train_head import train_head_command

    return train_head_command(arguments)


def _eval(arguments: list[str]) -> int:
    from workbench.cli.eval import eval_command

    return eval_command(arguments)


_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "fetch": _fetch,
    "list": _list,
    "doctor": _doctor,
    "report": _report,
    "train_head": _train_head,
    "quantize": _quantize,
    "eval": _eval,
}


def _fail(arguments: list[str], message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr)
    if "output=json" in arguments:
        print_document({"schema": 1, "error": message, "exit_status": status})
    return status


__all__ = ["UnsupportedError", "main"]
