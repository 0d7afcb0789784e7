# SPDX-License-Identifier: Apache-2.0

"""Lines for the log of the run, or of the command where no run is."""

import logging
from functools import partial

from mmengine.logging import print_log

info = partial(print_log, logger="current", level=logging.INFO)
warn = partial(print_log, logger="current", level=logging.WARNING)
