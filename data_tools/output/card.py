"""``README.md`` of the corpus: a Hugging Face dataset card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from data_tools.output import licences, stats
from data_tools.output.corpus_files import CONVERSATION_FILES, HELD_OUT
from data_tools.output.figures import FIGURES, file_name

if TYPE_CHECKING:
    from data_tools.job import Job

_SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)
WHAT = {
    "caption.jsonl": "what a picture, or a marked region of it, shows",
    "instruct.jsonl": "free instructions and dialogues about a picture",
    "percept.jsonl": "classification, detection, yes/no and multiple choice, from the labels alone",
    "text_single.jsonl": "one question and answer without a picture",
    "text_multi.jsonl": "dialogues without a picture",
    "records.jsonl": "the standard records: picture, modality, department, labels, boxes, provenance",
    "rejected.jsonl": "conversations that were set aside: reason, record, prompt, answer",
    "dropped.jsonl": "what was left out on the way to a record: reason, file",
    "prompts.jsonl": "prompt and answer of each conversation that a model wrote",
}
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>()#+!|~$&-])")


def write(folder: Path, summary: dict[str, Any], job: Job) -> None:
    """Write ``README.md``. It holds nothing that differs when the same corpus is made again."""
    front = yaml.safe_dump(front_matter(summary), sort_keys=False, allow_unicode=True)
    text = "\n".join(
        [
            f"---\n{front}---\n",
            f"# {escaped(summary['title'])}\n",
            *_opening(summary),
            *_files(summary),
            *_sources(summary),
            *_licences(summary),
            *_distributions(summary),
            *_provenance(summary, job),
            *_limits(summary),
        ]
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def front_matter(summary: dict[str, Any]) -> dict[str, Any]:
    """The card's metadata as huggingface.co reads it."""
    names = sorted({licences.read(row["licence"]).hub_name for row in summary["licences"]})
    count = summary["conversations"]["count"]
    configs = []
    for file in CONVERSATION_FILES:
        parts = [
            {"split": split, "path": prefix + file}
            for split, prefix in (("train", ""), ("test", f"{HELD_OUT}/"))
            if prefix + file in summary["files"]
        ]
        if parts:
            configs.append({"config_name": Path(file).stem, "data_files": parts})
    return {
        "pretty_name": summary["title"],
        "license": names[0] if len(names) == 1 else (names or "unknown"),
        "language": list(summary["conversations"]["language"]) or ["en"],
        "task_categories": ["visual-question-answering", "image-to-text"],
        "tags": ["medical", *([] if summary["writer"]["name"] == "template" else ["synthetic"])],
        "size_categories": [next((name for below, name in _SIZES if count < below), "n>10M")],
        **({"configs": configs} if configs else {}),
    }


def _opening(summary: dict[str, Any]) -> list[str]:
    records, conversations = summary["records"], summary["conversations"]
    return [
        f"{conversations['count']:,} conversations about {records['count']:,} records of "
        f"{records['pictures']:,} medical pictures. Every statement was made from, or held against, an "
        "expert's annotation of the picture, in the manner of GMAI-VL-5.5M (arXiv 2411.14522).",
        "",
        "**For research. Not for clinical use:** nothing in it is a diagnosis, and no text in it has been "
        "read by a physician unless the publisher of this corpus says so.",
        "",
        *(["To look at before use:", ""] if summary["warnings"] else []),
        *(f"- {escaped(text)}" for text in summary["warnings"]),
        *([""] if summary["warnings"] else []),
    ]


def _files(summary: dict[str, Any]) -> list[str]:
    rows = []
    for name, file in summary["files"].items():
        what = WHAT[Path(name).name]
        held = "held out: " if name.startswith(f"{HELD_OUT}/") else ""
        rows.append((f"`{name}`", f"{file['lines']:,}", held + what))
    split = summary["split"]
    return [
        "## Files",
        "",
        *_table(("file", "lines", "what it holds"), rows, right=(1,)),
        "",
        "Conversations are in LLaVA's form: `id`, `image` (below this folder), `width`, `height`, "
        "`conversations`. Boxes in the text are `[x1, y1, x2, y2]` in thousandths of the picture's width and "
        "height; in `records.jsonl` they are in pixels of the stored picture, half-open. Pictures are stored "
        "clean: no box is drawn into them.",
        "",
        f"Held out are {split['share']:.1%} of the {split['groups']:,} patients, cases, videos, slides or "
        "single pictures, by a hash of their name; groups that share a picture are on one side. "
        + (
            f"So are {split['near_duplicates']:,} pairs of near-identical pictures."
            if split["near_duplicates"] is not None
            else "Near-identical pictures were not looked for."
        ),
        "",
    ]


def _sources(summary: dict[str, Any]) -> list[str]:
    rows = []
    for name, source in summary["sources"].items():
        rows.append(
            (
                escaped(name),
                link(source["dataset"], source["url"]),
                escaped(source["licence"]),
                f"{source['records']:,}",
                f"{source['conversations']:,}",
                "" if source["acceptance"] is None else f"{source['acceptance']:.1%}",
            )
        )
    head = ("source", "dataset", "licence", "records", "conversations", "accepted")
    return [
        "## Sources",
        "",
        *_table(head, rows, right=(3, 4, 5)),
        "",
        *(
            f"- {escaped(source)} was left out: {escaped(row['reason'])} ({row['records']:,} records)."
            for source, row in summary["left_out"].items()
        ),
        *([""] if summary["left_out"] else []),
    ]


def _licences(summary: dict[str, Any]) -> list[str]:
    rows = [
        (
            escaped(row["licence"]),
            escaped(", ".join(row["sources"])),
            f"{row['records']:,}",
            "; ".join(licences.DEMANDS[demand] for demand in row["demands"]) or "nothing",
        )
        for row in summary["licences"]
    ]
    asked = {demand for row in summary["licences"] for demand in row["demands"]}
    lines = [
        "## Licences",
        "",
        "Each picture keeps the licence of its source, which `provenance.licence` in `records.jsonl` names.",
        "",
        *_table(("licence", "sources", "records", "what it asks for"), rows, right=(2,)),
        "",
    ]
    if "share-alike" in asked:
        lines += [
            "**Share-alike:** the corpus as a whole may only be passed on under terms that this licence "
            "allows. Make it again without those sources, `refuse: [share-alike]`, if that doesn't suit.",
            "",
        ]
    if asked & {"non-commercial", "no-derivatives", "agreement", "unknown"}:
        lines += [
            "**Restricted:** not all of it may be used or passed on freely; the table says why.",
            "",
        ]
    return lines


def _distributions(summary: dict[str, Any]) -> list[str]:
    lines = ["## Distributions", ""]
    for key in ("form", "language"):
        lines += _shares(key.capitalize(), "conversations", summary["conversations"][key])
    for key, title in FIGURES.items():
        counts = summary["records"][key]
        lines += _shares(title, "records", counts)
        lines += [f"![{title}]({file_name(key)})", ""] if counts else []
    return lines


def _shares(title: str, unit: str, counts: dict[str, int]) -> list[str]:
    total = sum(counts.values())
    rows = [(escaped(name), f"{n:,}", f"{n / total:.1%}") for name, n in counts.items()]
    return [*_table((title, unit, "share"), rows, right=(1, 2)), ""]


def _provenance(summary: dict[str, Any], job: Job) -> list[str]:
    readers = ", ".join(
        f"{escaped(source.name)} ({escaped(str(getattr(source, 'reader', '')))})"
        for source in job.sources
    )
    return [
        "## How it was made",
        "",
        f"- Readers: {readers}.",
        "- Each record names its source file, that file's SHA-256, the slice, frame or tile, and what was "
        "done to grey levels and geometry (`provenance` in `records.jsonl`). DICOM headers were read by a "
        "list of allowed attributes; who the patient is isn't among them.",
        f"- Conversations were {escaped(stats.writer(summary))}, checked against the annotation, and set "
        "aside with a reason where they didn't agree with it (`rejected.jsonl`).",
        f"- Seed {summary['seed']}. To make it again:",
        "",
        f"      python data_tools/generate.py {Path(job.path).name}",
        "",
        "- To train on it: set `GMAI_MIXTURE` to `mixture.yaml`.",
        "",
    ]


def _limits(summary: dict[str, Any]) -> list[str]:
    template = summary["writer"]["name"] == "template"
    return [
        "## Limits",
        "",
        "- An annotation says what its annotators were asked for; what they weren't asked for is "
        "neither there nor denied. Their errors are in the text.",
        "- "
        + (
            "The text is made of sentence patterns; it is true to the annotation, and poor in wording."
            if template
            else "The text was written by a model. The checks compare it with the annotation; what the "
            "annotation doesn't speak of could not be checked."
        ),
        "- Distributions are those of the sources, not of any clinic's patients.",
        "- Faces, names or dates that a source has in its pixels are still there.",
        "",
    ]


def _table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()
) -> list[str]:
    rule = ["---:" if place in right else "---" for place in range(len(head))]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def escaped(text: str) -> str:
    """One line of plain text in Markdown: what a label or a title holds is never taken as markup."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))


def link(text: str, url: str) -> str:
    """A link if it is to a web page, else the text alone."""
    if re.fullmatch(r"https?://[^\s<>()\[\]|\\\"'`]+", url):
        return f"[{escaped(text)}]({url})"
    return escaped(text)
