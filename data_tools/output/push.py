# SPDX-License-Identifier: Apache-2.0

"""A corpus -> a dataset repository of the hub: its Parquet shards, card, figures and manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.job import Job
from data_tools.licences import restriction
from data_tools.output import manifest
from data_tools.output.files import CONVERSATION_FILES, HELD_OUT
from gmai_xtuner.core.errors import CorpusError
from gmai_xtuner.core.records import iter_raw

# Nothing else that lies in the folder leaves with them.
_SHARDS = tuple(
    f"{side}{Path(file).stem}-[0-9][0-9][0-9][0-9][0-9].parquet"
    for side in ("", f"{HELD_OUT}/")
    for file in CONVERSATION_FILES
)
_FIGURES = "figures/*.png"
_OTHERS = (_FIGURES, manifest.NAME, "README.md", "summary.json")


def push(job: Job, repository: str, *, public: bool) -> str:
    """Upload a job's corpus and return the address of the commit; what is there already isn't sent again.

    Shards and figures of an earlier corpus are removed from the repository. It is made if need be, private
    unless ``public``. The hub, its token and its address are those of ``huggingface_hub`` (``HF_TOKEN``,
    ``HF_ENDPOINT``).

    Raises:
        CorpusError: the corpus isn't as its manifest says, holds what may not be published, or has no
            shards; the repository is public without ``public``; or the hub refuses.
    """
    # Not at the top: it takes half a second.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not (job.corpus.publishable and job.corpus.parquet):
        raise CorpusError(
            f"{job.path}: only a corpus that was made to be published is uploaded, as Parquet. Set "
            "corpus: {publishable: true, parquet: true}, run the job again, and then --push"
        )
    _, differences = manifest.verify(job.output)
    for fault, found in (
        ("is not as its manifest says", differences),
        ("holds what may not be published", _restricted(job)),
    ):
        if (told := next(found, None)) is not None:
            raise CorpusError(f"{job.output} {fault}: {told}. Run the job again")
    shards, others = (
        [str(file.relative_to(job.output)) for one in some for file in job.output.glob(one)]
        for some in (_SHARDS, _OTHERS)
    )
    if not shards:
        raise CorpusError(f"{job.output} has no Parquet shards. Run the job again")
    api = HfApi()
    try:
        api.create_repo(repository, repo_type="dataset", private=not public, exist_ok=True)
        if not public and not api.dataset_info(repository).private:
            raise CorpusError(
                f"{repository} is public. Add --public if the corpus is meant for everybody"
            )
        return api.upload_folder(
            repo_id=repository,
            repo_type="dataset",
            folder_path=job.output,
            allow_patterns=shards + others,
            delete_patterns=[*_SHARDS, _FIGURES],
            commit_message=f"{job.title}: corpus as of its manifest",
        ).commit_url
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        told = str(error).splitlines()[0]
        raise CorpusError(
            f"{repository} can't be written: {told}. Check name, HF_TOKEN and network; the same command "
            "goes on"
        ) from error


def _restricted(job: Job) -> Iterator[str]:
    """Yield sources, or records under a licence of their own, that the job as it is now keeps back."""
    sources = {source.name: source for source in job.sources}
    pairs = set()
    for raw in iter_raw(job.output / manifest.NAME, columns=None):
        row: Any = raw.decode()
        pairs.add((row["source"], row["licence"], row["may_be_published"]))
    for name, licence, allowed in sorted(pairs):
        if (source := sources.get(name)) is None:
            yield f"{name}, which is no source of the job"
            continue
        for one in (licence, source.licence):
            if why := restriction(source, job.agreements, one, publish=True):
                yield f"{name}: {why}"
        if not allowed:
            yield f"{name}, {licence!r}, by the manifest"
