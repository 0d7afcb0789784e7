# SPDX-License-Identifier: Apache-2.0

"""``README.md`` of the corpus, a Hugging Face dataset card, and its figures.

The figures are the paper's distributions (GMAI-VL, arXiv 2411.14522, figure 3): records by modality, original
task, department and clinical task. One hue, so that colour carries no meaning that some readers can't see;
bars lie, so that 38 long names are as legible as two.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from data_tools import licences
from data_tools.job import Job
from data_tools.output import short, templates
from data_tools.output.files import CONVERSATION_FILES, HELD_OUT
from data_tools.output.summary import FIGURES
from data_tools.privacy import method_of

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"),
          (1_000_000, "100K<n<1M"), (10_000_000, "1M<n<10M"))  # fmt: skip
_BLUE = "#0072B2"  # of Okabe and Ito's palette
_GREY = "#444444"
_ROW = 0.3  # inches a bar
_LONGEST_NAME = 60
_CHINESE = ("Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC",
            "Microsoft YaHei")  # fmt: skip


def write(folder: Path, summary: dict[str, Any], job: Job) -> None:
    """Write ``README.md`` and its figures. Made again, they are the same bytes."""
    made, methods = templates(), defaultdict[str, list[str]](list)
    for source in (source for source in job.sources if source.name in summary["sources"]):
        methods[method_of(source)[0]].append(source.name)
    made.filters["figure"] = _figure
    text = made.get_template("output/card.md.j2").render(
        summary=summary,
        job=job,
        front=yaml.safe_dump(front_matter(summary, job), sort_keys=False, allow_unicode=True),
        demands=licences.DEMANDS,
        asked={demand for row in summary["licences"] for demand in row["demands"]},
        figures=FIGURES,
        methods=methods,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    for key, title in FIGURES.items():
        if counts := summary["records"][key]:
            draw(folder / _figure(title), counts, title=title)


def _figure(title: str) -> str:
    return f"figures/{title.lower().replace(' ', '_')}.png"


def front_matter(summary: dict[str, Any], job: Job) -> dict[str, Any]:
    """Return the card's metadata as huggingface.co reads it."""
    names = sorted({licences.read(row["licence"]).hub_name for row in summary["licences"]})
    count = summary["conversations"]["count"]
    configs, end = [], "-*.parquet" if job.corpus.parquet else ".jsonl"
    for file in CONVERSATION_FILES:
        parts = [
            {"split": split, "path": prefix + Path(file).stem + end}
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


def draw(path: Path, counts: dict[str, int], *, title: str) -> None:
    """Draw a bar for each name in the given order, with its count and share."""
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(font for font in _CHINESE if font in installed)]
    total = sum(counts.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"font.family": fonts, "font.size": 9}):
        figure = Figure(figsize=(7.2, 0.9 + _ROW * len(counts)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        bars = axes.barh(range(len(counts)), list(counts.values()), height=0.7, color=_BLUE)
        axes.set_yticks(
            range(len(counts)), [short(name, _LONGEST_NAME) for name in counts], parse_math=False
        )
        axes.set_ylim(len(counts) - 0.4, -0.6)
        axes.set_xlim(0, 1.25 * max(counts.values()))
        axes.bar_label(
            bars,
            [f"{count:,}  ({count / total:.1%})" for count in counts.values()],
            padding=4,
            color=_GREY,
        )
        axes.xaxis.set_visible(False)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_title(f"{title} ({total:,} records)", loc="left", fontsize=11)
        with warnings.catch_warnings():
            # A name in a script that no installed font has is drawn as boxes; report.html shows it.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            figure.savefig(path, metadata={"Software": None})
