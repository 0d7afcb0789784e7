# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
from jinja2 import UndefinedError

from gmai_xtuner.core import yaml_lines
from gmai_xtuner.core.errors import CorpusError, MixtureError
from gmai_xtuner.core.templates import environment
from gmai_xtuner.core.yaml_lines import Document, Section


def document(path: Path, text: str, **options) -> Document:
    path.write_text(text, encoding="utf-8")
    return Document(path, what="job file", **options)


def test_values_are_typed_keys_are_text_and_each_has_its_line(tmp_path):
    found = document(
        tmp_path / "a.yaml",
        "\ufeff# first\n1: neutrophil\nno: [yes, 2,\n  three]\nb: &x\n  c: 0.5\nd: *x\n",
    )
    assert found.data == {
        "1": "neutrophil",
        "no": [True, 2, "three"],
        "b": {"c": 0.5},
        "d": {"c": 0.5},
    }
    lines = [((), 1), (("1",), 2), (("no", 1), 3), (("no", 2), 4), (("b", "c"), 6), (("d",), 7)]
    assert [found.line(place) for place, _ in lines] == [line for _, line in lines]
    assert found.line(("b", "unknown", 3)) == found.line(("b",)) == 5


def test_dates_and_times_are_texts_and_all_is_one_if_asked(tmp_path):
    text = "names: {0: 2024-01-01, 1: 12:30:45, 2: no, 3: 2024-13-45, 4: 1:30.5, 5: 7}\n"
    names = ["2024-01-01", "12:30:45", "no", "2024-13-45", "1:30.5", "7"]
    found = document(tmp_path / "a.yaml", text).data["names"]
    assert list(found.values()) == [*names[:2], False, *names[3:5], 7]
    assert list(document(tmp_path / "a.yaml", text, as_text=True).data["names"].values()) == names


def test_json_with_tabs_and_a_trailing_comma(tmp_path):
    assert document(tmp_path / "a.json", '{\n\t"a": [1,\n\t\t2],\n}').data == {"a": [1, 2]}
    assert document(tmp_path / "a.json", r'{"a": "\ud83e\udec0 \/ \u80ba"}').data == {
        "a": "🫀 / 肺"
    }


def test_an_empty_file_has_no_data(tmp_path):
    assert document(tmp_path / "a.yaml", "# nothing\n").data is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3: the key 'a' is there twice, first in line 1."),
        ("a: {b: 1,\n b: 2}", ":2: the key 'b' is there twice, first in line 1."),
        ("a: &a\n  b: *a\n", "an alias that contains itself."),
        ("a: !!set {b}", ":1: not valid YAML: the tag 'tag:yaml.org,2002:set' is of no use"),
        ("a: 1\nb: !!python/none 1", ":2: not valid YAML: the tag"),
        ("a: 1\nb: " + "1" * 5_000, ":2: a number beyond 64 bits; put it in quotes"),
        ("a: 1\nb: 9223372036854775808", ":2: a number beyond 64 bits"),
        ("a: 0x" + "f" * 50_000, ":1: a number beyond 64 bits"),
        ('a: "\\ud800"', "not valid YAML"),
        ("a: !!binary aGk=", ":1: not valid YAML: the tag 'tag:yaml.org,2002:binary' is of no use"),
        ("a:\n" + "- " * 50_000 + "x", "exceeded maximum nesting depth"),
        ("{a: " * 50_000, "exceeded maximum nesting depth"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n", ":3: merge keys (<<) are not supported"),
        ("[a]: 1", ":1: a key must be plain text."),
        ("a: [\n", ":2: not valid YAML"),
        ("[" * 5000, "exceeded maximum nesting depth"),
    ],
)
def test_what_is_refused_says_file_and_line(tmp_path, text, message):
    with pytest.raises(CorpusError) as caught:
        document(tmp_path / "a.yaml", text, error=CorpusError)
    assert str(caught.value).startswith(str(tmp_path / "a.yaml"))
    assert message in str(caught.value)


def test_unreadable_files(tmp_path, monkeypatch):
    with pytest.raises(MixtureError, match=r"none\.yaml: the plan can't be read .* Do so\."):
        Document(tmp_path / "none.yaml", what="plan", error=MixtureError, remedy="Do so.")
    (tmp_path / "latin.yaml").write_bytes("a: ä".encode("latin-1"))
    with pytest.raises(MixtureError, match="is not UTF-8"):
        Document(tmp_path / "latin.yaml", what="plan", error=MixtureError)
    monkeypatch.setattr(yaml_lines, "MAX_NODES", 100)
    with pytest.raises(CorpusError, match="more than 100 values"):
        document(
            tmp_path / "bomb.yaml",
            "a: &a [1,2,3,4,5,6,7,8,9]\nb: &b [*a,*a,*a,*a]\nc: [*b,*b,*b,*b]\n",
            error=CorpusError,
        )
    monkeypatch.setattr(yaml_lines, "MAX_BYTES", 100)
    with pytest.raises(CorpusError, match="at most 100 are read"):
        document(tmp_path / "large.yaml", "a: 1\n" + "#" * 200, error=CorpusError)


def test_a_section_under_other_names_keeps_the_lines(tmp_path):
    top = Section(document(tmp_path / "a.yaml", "x:\n  length: 3\n  other: 4\n"), title="all")
    own = top.section("x", names={"size": "length", "ratio": "sample_ratio"})
    assert own.values == {"size": 3}
    assert ("size" in own, "ratio" in own) == (True, False)
    assert str(own.error("wrong", remedy="Mend it.", key="size")).endswith(
        "a.yaml:2: 'x': wrong. Mend it."
    )


def test_what_a_section_asks_of_its_values(tmp_path):
    top = Section(document(tmp_path / "a.yaml", "a: [b, c]\nd: e\nf: [g, '']\nh: {}\n"), title="it")
    assert top.texts("a", what="a name") == ["b", "c"]
    assert top.texts("d", what="a name") == ["e"]
    assert top.scalar("d", lambda value: value == "e", "e") == "e"
    for ask, message in (
        (lambda: top.texts("f", what="a name"), ":3: it: f must be a name or a list"),
        (lambda: top.scalar("h", bool, "a text"), ":4: it: h must be one value"),
        (lambda: top.scalar("d", lambda value: value == 3, "3"), ":2: it: d must be 3, got 'e'"),
        (lambda: top.section("d"), ":2: 'd': a mapping was expected"),
        (lambda: top.check_keys(["a", "d", "f", "house"]), ":4: it: unknown key 'h'"),
    ):
        with pytest.raises(ValueError) as caught:
            ask()
        assert message in str(caught.value)


# --- Templates: a missing value is an error, values of pages are escaped, tags leave no lines ---


def test_a_missing_value_is_an_error():
    with pytest.raises(UndefinedError, match="count"):
        environment("gmai_xtuner").from_string("{{ count }}").render()


def test_tags_leave_no_lines():
    text = "a\n  {% if true %}\nb\n  {% endif %}\nc"
    assert environment("gmai_xtuner").from_string(text).render() == "a\nb\nc"
