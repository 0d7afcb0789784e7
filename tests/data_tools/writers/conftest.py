# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.api_server import ApiServer


@pytest.fixture
def serve() -> Iterator[Callable[..., ApiServer]]:
    """Start an `ApiServer`; it ends with the test."""
    with ExitStack() as servers:

        def start(*arguments: Any, **keywords: Any) -> ApiServer:
            return servers.enter_context(ApiServer(*arguments, **keywords))

        yield start
