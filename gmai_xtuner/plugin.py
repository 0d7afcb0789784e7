# SPDX-License-Identifier: Apache-2.0

"""The plugin that a config imports: ``custom_imports = dict(imports=["gmai_xtuner.plugin"])``.

Importing it registers the datasets, samplers, model, loop and hooks in xtuner's ``BUILDER`` and
``MAP_FUNC`` and in mmengine's registries, makes xtuner 0.2.0 work where it does not
(:mod:`gmai_xtuner.compat`), and sends what the package logs to mmengine's current logger. No other module
has effects on import.
"""

import logging

from gmai_xtuner import compat

compat.xtuner.own_the_command()
compat.apply()

from mmengine.logging import MMLogger  # noqa: E402
from xtuner.registry import MAP_FUNC  # noqa: E402

from gmai_xtuner.checkpoint import bases, llava, tokenizer  # noqa: E402, F401
from gmai_xtuner.data import dataset, sampler  # noqa: E402, F401
from gmai_xtuner.data.tokenization import soft_packing_map_fn  # noqa: E402
from gmai_xtuner.train import (  # noqa: E402, F401
    benchmarks,
    checkpointing,
    hooks,
    loop,
    nonfinite,
    sample_answer,
    schedule,
    start,
    validation,
)


class _ToTrainingLog(logging.Handler):
    """Hands records to the logger of the run, as mmengine's ``print_log(..., logger="current")`` does.

    Outside of a run, where mmengine has its default logger only, a program that has set up logging itself
    sees them there.
    """

    def emit(self, record: logging.LogRecord) -> None:
        current = MMLogger.get_current_instance()
        is_in_run = current.instance_name != "mmengine"
        if current.isEnabledFor(record.levelno) and (is_in_run or not logging.root.handlers):
            current.handle(record)


def _forward_package_log() -> None:
    package = logging.getLogger("gmai_xtuner")
    if any(type(handler).__name__ == _ToTrainingLog.__name__ for handler in package.handlers):
        return
    package.addHandler(_ToTrainingLog())
    if not logging.root.handlers:
        package.setLevel(logging.INFO)


_forward_package_log()
if "soft_packing_map_fn" not in MAP_FUNC:
    MAP_FUNC.register_module(module=soft_packing_map_fn, name="soft_packing_map_fn")
