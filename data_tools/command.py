# SPDX-License-Identifier: Apache-2.0

"""The exit status of the commands, and every error as one message."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Callable

from gmai_xtuner.core.errors import GMAIError

DONE, FAILED, INTERRUPTED = 0, 1, 130


def exit_status(run: Callable[[], int]) -> int:
    """Return what ``run`` returns, `FAILED` after an error, which is printed, or `INTERRUPTED`.

    Args:
        run: the command, which keeps what it has done.
    """
    try:
        return run()
    except GMAIError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # of `| head`
        sys.stderr.close()
        return FAILED
    except (OSError, sqlite3.Error) as error:
        print(
            f"error: {error}. What was done is kept: make room or check the rights, and run it again",
            file=sys.stderr,
        )
        return FAILED
