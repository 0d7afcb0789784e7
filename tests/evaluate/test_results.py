# SPDX-License-Identifier: Apache-2.0

"""Numbers of tables worked out by hand."""

import csv
import io
from dataclasses import replace

from gmai_xtuner.evaluate.protocols import Asked, Average, Protocol
from gmai_xtuner.evaluate.questions import Question, Score
from gmai_xtuner.evaluate.results import (
    Scored,
    as_json,
    average_of,
    read_result,
    read_scores,
    summarise,
    write_result,
)
from gmai_xtuner.evaluate.store import Answer, Identity
from gmai_xtuner.evaluate.tables import (
    Row,
    Table,
    group_tables,
    latex,
    paper_tables,
    summary_table,
    tables_like_the_papers,
    to_csv,
    to_latex,
    to_markdown,
)
from tests.evaluate.files import find_protocol
from tests.evaluate.sets import TYPES


def scored(number: int, value: float | None, *, parsed: str | None = "A", **groups: str) -> Scored:
    question = Question(f"q{number}", "?", options=("x", "y"), answer="x", groups=groups)
    answer = Answer(question.id, "?", "A", 0.0, "sha256:m", "p/1", {"max_new_tokens": 8})
    return Scored(question, answer, Score(value, parsed))


def result(
    chosen: Protocol,
    answers: list[Scored],
    *,
    name: str = "ours",
    scorer: str | None = None,
    **more,
):
    asked = Asked(chosen, tuple(one.question for one in answers), len(answers))
    return summarise(
        asked,
        answers,
        Identity("b", "v", "sha256:m", name, {"decoding": "greedy"}),
        scorer=scorer or chosen.scorer,
        left_out=more.get("left_out", {}),
        unanswered=more.get("unanswered", {}),
    )


def omnimedvqa():
    """Two right of four in the first type, one of one in each other; one of the wrong not understood."""
    values = (1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0)
    types = (*[TYPES[0]] * 4, *TYPES[1:])
    every = [
        scored(
            n,
            values[n],
            parsed=None if n == 3 else "A",
            modality=("CT", "MR")[n % 2],
            dataset="d",
            question_type=types[n],
        )
        for n in range(8)
    ]
    return result(find_protocol("omnimedvqa"), every)


def test_micro_and_macro_averages_and_groups():
    made = omnimedvqa()
    assert made.averages["micro"].value == 6 / 8
    assert made.averages["macro over question_type"].value == (0.5 + 4) / 5 == 0.9
    # CT: 1, 1(q2 is 0)... questions 0, 2, 4, 6 and 1, 3, 5, 7: three of four each.
    assert made.averages["macro over modality"].value == 0.75
    assert made.headline.unparsed == 1 / 8
    types = made.groups["question_type"]
    assert [(cell.n, cell.value) for cell in types.values()] == [(4, 0.5), *[(1, 1.0)] * 4]
    assert types[TYPES[0]].unparsed == 0.25
    assert types[TYPES[1]].interval is None  # one question
    assert (types[TYPES[0]].interval.low, types[TYPES[0]].interval.high) == (0.0, 1.0)


def test_questions_without_gold_have_no_score_and_are_not_wrong():
    chosen = find_protocol("gmai_mmbench", variant="test")
    made = result(chosen, [scored(0, None), scored(1, None, parsed=None)])
    assert made.headline.value is None
    assert (made.headline.n, made.headline.unparsed) == (2, 0.5)
    assert average_of([scored(0, None), scored(1, 1.0)], Average("micro")).value == 1.0


def test_what_makes_a_number_another_than_the_protocols_is_told():
    made = result(
        find_protocol("vqa_rad"),
        [scored(0, 1.0)],
        left_out={"missing_image": 2},
        unanswered={"server_failed": 1},
    )
    assert made.problems == [
        "2 questions (missing_image 2) left out when the files of the variant test were read, "
        "whatever protocol they belong to",
        "1 questions (server_failed 1) without an answer, not in the score",
        "the files have 1 questions of this protocol, the authors' have 251",
    ]
    assert not made.complete
    assert result(find_protocol("vqa_rad"), [scored(0, 1.0)]).complete


def test_a_result_is_read_as_it_was_written(tmp_path):
    made, one = omnimedvqa(), scored(0, 1.0, modality="CT")
    odd = "left\u2028right\u2029up\u0085down\x1c\r\n."  # what Python calls the end of a line
    one = replace(one, answer=replace(one.answer, answer=odd))
    write_result(tmp_path, made, [one, scored(1, 0.0, parsed=None)])
    read, scores = read_result(tmp_path), read_scores(tmp_path)
    assert read == made
    assert (scores["q0"]["groups"], scores["q0"]["answer"]) == ({"modality": "CT"}, odd)
    assert (scores["q1"]["value"], scores["q1"]["parsed"]) == (0.0, None)
    assert as_json(read)["complete"] is True


def test_the_papers_table_of_question_types_with_ours_below():
    (table,) = tables_like_the_papers([omnimedvqa()])
    assert table.head == ("model", "MR", "AI", "DD", "LG", "OBA", "Overall", "micro", "macro")
    quoted = [row for row in table.rows if row.kind == "quoted"]
    assert len(quoted) == 20
    assert quoted[-1] == Row(
        "GMAI-VL (quoted)",
        ("98.64", "92.95", "88.7", "87.21", "82.95", "88.48", "–", "–"),
        "quoted",
    )
    score, interval, n, unparsed = table.rows[-4:]
    assert score.label == "ours, open-88996"
    assert score.cells == ("50.00", *["100.00"] * 4, "–", "75.00", "90.00")
    assert interval.cells[0] == "0.00 to 100.00"
    assert n.cells == ("4", "1", "1", "1", "1", "–", "8", "8")
    assert unparsed.cells == ("25.00", *["0.00"] * 4, "–", "12.50", "12.50")
    assert "not measured here" in table.notes[0]


def test_all_18_columns_of_gmai_mmbench_in_the_papers_order():
    names = [
        column["name"] for column in paper_tables()["gmai_mmbench"]["columns"] if "name" in column
    ]
    answers = [
        scored(number, float(number % 3 == 0), **{"clinical VQA task": name.replace("-", "_")})
        for number, name in enumerate(reversed(names))
    ]
    (table,) = tables_like_the_papers([result(find_protocol("gmai_mmbench"), answers)])
    tasks = "AR BVR B CR C DD IQG MR M NT OR-A OR-HN OR-P OR-T SG SAR SIR SWR"
    assert " ".join(table.head[1:]) == f"Overall (val) Overall (test) {tasks}"
    score = table.rows[-4]
    assert score.cells[:2] == ("33.33", "–")  # VAL says nothing of TEST
    expected = ["100.00" if (17 - place) % 3 == 0 else "0.00" for place in range(18)]
    assert list(score.cells[2:]) == expected
    gpt = next(row for row in table.rows if row.label == "GPT-4o (quoted)")
    assert gpt.cells[:3] == ("53.53", "53.96", "38.32")


def test_each_row_of_the_paper_has_a_cell_for_each_column():
    for table in paper_tables().values():
        assert {len(cells) for cells in table["rows"].values()} == {len(table["columns"])}


def test_a_group_that_the_paper_does_not_have_is_told():
    answers = [scored(0, 1.0, **{"clinical VQA task": "Teeth"})]
    (table,) = tables_like_the_papers([result(find_protocol("gmai_mmbench"), answers)])
    assert "Not among the paper's columns, but in the averages: Teeth." in table.notes


def test_the_table_over_benchmarks_takes_the_mean_only_of_all():
    rad = result(find_protocol("vqa_rad", "full-451"), [scored(0, 1.0), scored(1, 0.0)])
    slake = result(find_protocol("slake"), [scored(0, 1.0)])
    pmc = result(find_protocol("pmc_vqa"), [scored(n, float(n == 0)) for n in range(4)])
    (table,) = tables_like_the_papers([rad, slake])
    assert table.rows[-4].cells == ("50.0", "100.0", "–", "–")
    (table,) = tables_like_the_papers([rad, slake, pmc])
    assert table.rows[-4].cells == ("50.0", "100.0", "25.0", "58.3")
    assert table.rows[-2].cells == ("2", "1", "4", "–")
    assert any(
        "VQA-RAD of ours: full-451/2, scorer closed_or_recall" in note for note in table.notes
    )
    zh = result(find_protocol("slake", variant="zh"), [scored(0, 1.0)])
    assert tables_like_the_papers([zh]) == []


TRICKY = Table(
    "tricky",
    "50% of A|B & C_d",
    ("group", "score %"),
    (Row("q (quoted)", ("1",), "quoted"), Row("x|y\nz", ("2",))),
    ("a note.",),
)


LATEX = r"""% Needs \usepackage{booktabs}.

\begin{table}
\caption{50\% of A|B \& C\_d}
\label{tab:tricky}
\begin{tabular}{lr}
\toprule
group & score \% \\
\midrule
\textit{q (quoted)} & 1 \\
\midrule
x|y z & 2 \\
\bottomrule
\end{tabular}
\end{table}
% a note.
"""


def test_markdown_csv_and_latex_of_a_tricky_table():
    assert to_markdown([TRICKY]) == (
        "## 50% of A|B & C_d\n\n| group | score % |\n| :--- | ---: |\n| *q (quoted)* | 1 |\n"
        "| **x\\|y z** | 2 |\n\n- a note.\n"
    )
    assert list(csv.reader(io.StringIO(to_csv([TRICKY])))) == [
        ["table", "kind", "group", "score %"],
        ["tricky", "quoted", "q (quoted)", "1"],
        ["tricky", "score", "x|y\nz", "2"],
    ]
    assert to_latex([TRICKY]) == LATEX
    assert latex("a\\b~c^d{e}") == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\{e\}"


def test_each_table_has_n_and_unparsed_share():
    made = omnimedvqa()
    for table in [summary_table([made]), *group_tables(made)]:
        assert {"n", "unparsed %"} <= set(table.head)
    for table in tables_like_the_papers([made]):
        assert {"n", "unparsed"} <= {row.kind for row in table.rows}
    by_type = group_tables(made)[0]
    assert by_type.rows[0] == Row(TYPES[0], ("4", "50.00", "0.00 to 100.00", "25.00"), "group")
    assert by_type.rows[-3].label == "micro"
