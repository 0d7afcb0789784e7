"""The paper's distributions as figures: records by modality, original task, department and clinical task.

GMAI-VL, arXiv 2411.14522, figure 3. One hue, so that colour carries no meaning that some readers can't
see; bars lie, so that 38 long names are as legible as two.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

FIGURES = {
    "modality": "Modality",
    "source_task": "Original task",
    "department": "Department",
    "clinical_task": "Clinical task",
}
_BLUE = "#0072B2"  # of Okabe and Ito's palette
_GREY = "#444444"
_ROW = 0.3  # inches a bar
_LONGEST_NAME = 60
_CHINESE = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Microsoft YaHei",
)


def file_name(key: str) -> str:
    """Name of a figure below the corpus folder, such as ``figures/modality.png``."""
    return f"figures/{FIGURES[key].lower().replace(' ', '_')}.png"


def write(folder: Path, records: dict[str, Any]) -> list[str]:
    """Write the figures of ``summary["records"]`` that have a bar; their names below the folder."""
    written = []
    for key, title in FIGURES.items():
        if records[key]:
            path = folder / file_name(key)
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(path, records[key], title=title)
            written.append(file_name(key))
    return written


def draw(path: Path, counts: dict[str, int], *, title: str) -> None:
    """One figure: a bar for each name in the given order, with its count and share."""
    import matplotlib
    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    installed = set(font_manager.get_font_names())
    fonts = ["DejaVu Sans", *(font for font in _CHINESE if font in installed)]
    total = sum(counts.values())
    with matplotlib.rc_context({"font.family": fonts, "font.size": 9}):
        figure = Figure(figsize=(7.2, 0.9 + _ROW * len(counts)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        bars = axes.barh(range(len(counts)), list(counts.values()), height=0.7, color=_BLUE)
        axes.set_yticks(range(len(counts)), [_short(name) for name in counts], parse_math=False)
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


def _short(name: str) -> str:
    name = "".join(character if character.isprintable() else " " for character in name)
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
