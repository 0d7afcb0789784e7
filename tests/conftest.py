# SPDX-License-Identifier: Apache-2.0

import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

import gmai_xtuner.plugin  # noqa: F401
from examples.tiny_bases import write_tiny_bases
from gmai_xtuner.checkpoint.tokenizer import load_tokenizer
from gmai_xtuner.core.imaging import bounded
from gmai_xtuner.generate import Predictor
from tests.browser import chromium
from tests.toy import Corpus, write_corpus

# How long an example takes says something about the machine, not about the code; and the same examples every
# time, so that a run fails for what has changed. `make fuzz` looks for new ones.
settings.register_profile("untimed", deadline=None, derandomize=True)
settings.load_profile("untimed")

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


def pytest_configure(config: pytest.Config) -> None:
    """Ctrl-C reaches what the tests start, also where they were started with ``&`` in a script.

    A shell without job control has its background commands ignore the signal, and whatever they start
    inherits that.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files in the order in which ``-n`` deals them out: first those with slow tests, the fullest first.

    What comes last is short then, and no process waits for another that has a file of minutes.
    """
    tests = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -tests[item.path]))


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Puts code in the place of a library, for the processes that untrusted files are opened in."""

    def plant(library: str, code: str) -> None:
        (tmp_path / "planted").mkdir()
        (tmp_path / "planted" / f"{library}.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path / "planted")

    bounded._stop_workers()
    yield plant
    bounded._stop_workers()


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with ``llm`` and ``vision``: 1,536 ids, 64 tokens an image. Read only."""
    directory = tmp_path_factory.mktemp("tiny_bases")
    write_tiny_bases(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tiny_bases: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of ``tiny_bases``. Read only."""
    return load_tokenizer(str(tiny_bases / "llm"))


@pytest.fixture(scope="session")
def export(tiny_bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny export that tells its prompts apart. Read only."""
    from tests.exports import write_export

    return write_export(tiny_bases, tmp_path_factory.mktemp("exports") / "tiny-export")


@pytest.fixture(scope="session")
def predictor(export: Path) -> Predictor:
    """Return the model of ``export``; a test puts back what it changes."""
    from gmai_xtuner.loading import load_model

    return load_model(export)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The sample data beside the repository, which not every checkout has."""
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the shared sample data beside the repository")
    return SHARED_DATA


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Corpus]:
    """Call it with what :func:`tests.toy.write_corpus` takes after the folder."""
    number = 0

    def make(datasets: Mapping[str, Sequence[dict[str, Any] | bytes]], **options: Any) -> Corpus:
        nonlocal number
        number += 1
        return write_corpus(tmp_path / f"corpus{number}", datasets, **options)

    return make


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; the test is skipped where none is installed."""
    with chromium() as running:
        yield running
