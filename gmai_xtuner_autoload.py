# SPDX-License-Identifier: Apache-2.0

"""What ``import torch`` calls in an environment with this package (entry point group ``torch.backends``).

A module of its own, so that another or a broken ``gmai_xtuner`` on the path never breaks ``import torch``.
:mod:`gmai_xtuner.train.names` says what for.
"""

from contextlib import suppress


def wait_for_xtuner() -> None:
    """Have the names of our configs entered when ``xtuner.configs`` is imported."""
    with suppress(ImportError):
        from gmai_xtuner.train import names

        names.wait_for_xtuner()
