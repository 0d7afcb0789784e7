# SPDX-License-Identifier: Apache-2.0

"""``python -m gmai_xtuner.preflight CONFIG [--gpus N] [--deepspeed zero2] [--json] ...``

Exit status: 0 if the run would start, 1 if it would fail, 2 if the command line can't be understood.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from gmai_xtuner.cli import (
    add_allow_pickle,
    only_the_report_on_stdout,
    positive_int,
    positive_number,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    with only_the_report_on_stdout() as stdout:
        import gmai_xtuner.plugin  # noqa: F401  (makes xtuner and torch work together)
        from gmai_xtuner.preflight.report import as_json, as_text
        from gmai_xtuner.preflight.run_config import UsageError, load_run
        from gmai_xtuner.preflight.survey import look_at

        try:
            run = load_run(
                options.config,
                deepspeed=options.deepspeed,
                gpus=options.gpus,
                options=_overrides(parser, options.cfg_options),
                work_dir=options.work_dir,
            )
        except UsageError as error:
            parser.error(str(error))
        result = look_at(
            run,
            gpu_memory=options.gpu_memory,
            throughput=options.throughput,
            decode_images=options.images,
            need_weights=not options.without_weights,
        )
        if options.json:
            json.dump(as_json(result), stdout, ensure_ascii=False, indent=1)
            stdout.write("\n")
        else:
            stdout.write(as_text(result))
    return int(result.findings.would_fail)


def _overrides(parser: argparse.ArgumentParser, pairs: Sequence[str] | None) -> dict[str, Any]:
    """Read ``key=value`` pairs as ``xtuner train`` does."""
    from mmengine.config import DictAction

    read = argparse.Namespace(values={})
    for pair in pairs or ():
        if "=" not in pair:
            parser.error(f"--cfg-options takes KEY=VALUE, got {pair!r}")
    DictAction(["--cfg-options"], "values")(parser, read, pairs or [])
    return dict(read.values)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        prog="python -m gmai_xtuner.preflight",
        description="What a run will be, and whether it would fail, before a GPU is queued for.",
    )
    add = parser.add_argument
    add("config", help="configs/gmai_vl/*.py, or a child of one")
    add("--gpus", type=positive_int, default=1, help="of all machines together (default 1)")
    add("--deepspeed", default="zero2", help="as for xtuner train: name or file (default zero2)")
    add("--cfg-options", nargs="+", metavar="KEY=VALUE", help="as for xtuner train")
    add("--work-dir", help="as for xtuner train")
    add_allow_pickle(parser)
    add("--json", action="store_true", help="one JSON object on standard output")
    add("--images", action="store_true", help="decode every image of the mixture")
    text = "tokens a second on one GPU, as the log's tokens_per_second: gives the hours"
    add("--throughput", type=positive_number, metavar="TOKENS", help=text)
    text = "of one GPU (default 80)"
    add("--gpu-memory", type=positive_number, default=80.0, metavar="GIB", help=text)
    text = "plan on a machine that has neither the bases' weights nor the stage before"
    add("--without-weights", action="store_true", help=text)
    return parser


if __name__ == "__main__":
    sys.exit(main())
