# SPDX-License-Identifier: Apache-2.0

"""``docs/settings.md`` says what becomes of other programs' settings, as the code does it.

After a change of the tables: ``python -m tests.train.test_settings_page`` writes the page anew.
"""

from __future__ import annotations

from pathlib import Path

from gmai_xtuner.train.settings import CONFIG_DECIDES, DROPPED, HABITS, HONOURED, REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
HEAD = """# Settings of other programs

`xtuner train` and the preflight check every key before weights load, by the same code. A key that nothing
reads stops the start and is told the nearest right name; so does a key of a DeepSpeed file that would change
what is learnt.
"""


def page() -> str:
    lines = [
        HEAD,
        "## In a config or in `--cfg-options`",
        "",
        "| given | stops the start; meant is |",
    ]
    lines.append("|---|---|")
    for name, meant in sorted(HABITS.items()):
        meant = meant.removeprefix("nothing: ") if meant.startswith("nothing: ") else f"`{meant}`"
        lines.append(f"| `{name}` | {meant} |")
    lines += ["", "## In a DeepSpeed file", "", "| key | what happens |", "|---|---|"]
    fates = {
        **dict.fromkeys(HONOURED, "honoured"),
        **{
            key: f"overruled, with a line: `{ours}` decides" for key, ours in CONFIG_DECIDES.items()
        },
        **{key: f"overruled, with a line: {why}" for key, why in DROPPED.items()},
        **{key: f"refused: {why}" for key, why in REFUSED.items()},
    }
    lines += [f"| `{key}` | {fate} |" for key, fate in sorted(fates.items())]
    lines.append("| `\"auto\"` for a value | the config's own value, or DeepSpeed's default |")
    lines.append("| any other key | refused, with the nearest right name |")
    return "\n".join(lines) + "\n"


def test_the_page_says_what_the_code_does():
    text = PAGE.read_text(encoding="utf-8")
    assert text == page()
    assert text.count("\n| ") >= 60


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
