# SPDX-License-Identifier: Apache-2.0

"""What the template writer makes: true to the record, accepted by the checks, the same every time."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from string import Formatter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_tools import taxonomy
from data_tools.checks import CheckOptions, check
from data_tools.forms import FORM_VERSIONS, MakeOptions, plan, write
from data_tools.forms.conversations import absent
from data_tools.forms.coordinates import read_boxes, write_box
from data_tools.forms.language import Teller, Word, language
from data_tools.items import FORMS, IMAGE, TEXT_FORMS, Item, SourceContext, Task
from data_tools.lexicon import indefinite, kinds_among, noun, spoken
from data_tools.records import Label, Provenance, Record

TAXONOMY = taxonomy.load()
EN, ZH = language("en"), language("zh")
VOCABULARY = ("COVID-19", "edema", "nodule", "normal", "platelet", "red blood cell", "spleen")
CHINESE = dict(
    zip(VOCABULARY, ("新冠肺炎", "水肿", "结节", "正常", "血小板", "红细胞", "脾脏"), strict=True)
)
CONTEXT = SourceContext("toy", "Toy", VOCABULARY, {}, CHINESE, known=VOCABULARY)
EVERYTHING = MakeOptions(
    caption=2, region_caption=3, instruction=3, dialogue=2, perception=9, text_single=2, text_multi=2,
    chinese=0.5,
)  # fmt: skip


def record(
    *labels, name="2d#cls#x", modality="CT", department="Hematology", attributes=None, task=None,
    incomplete=(),
):  # fmt: skip
    return Record(
        name, "images/x.png", 640, 480, modality, department, task, "2D classification", tuple(labels),
        attributes or {}, Provenance("toy", "Toy", "MIT", "", "x.png", "0" * 64, {}, "toy/x"),
        tuple(incomplete),
    )  # fmt: skip


def conversations(of, make=EVERYTHING, context=CONTEXT, seed=0):
    for item in plan(of, context, make, seed=seed):
        yield item, write(Task(item, of, context), TAXONOMY)


def said(of, **make):
    """All texts of some forms in English."""
    options = MakeOptions(**dict.fromkeys(FORMS, 0) | {"chinese": 0} | make)
    made = (made for seed in range(120) for _, made in conversations(of, options, seed=seed))
    return {turn.text for turns in made for turn in turns}


boxes = st.builds(
    lambda x, y, w, h: (x, y, min(640, x + w), min(480, y + h)),
    st.integers(0, 639), st.integers(0, 479), st.integers(1, 640), st.integers(1, 480),
)  # fmt: skip
labels = st.builds(
    Label, st.sampled_from([name for name in VOCABULARY if name != "normal"]), st.none() | boxes
)
records = st.builds(
    lambda labels, name, modality, department, side, incomplete, task: record(
        *labels, name=f"2d#cls#{name}", modality=modality, department=department, task=task,
        attributes={"side": side, "view": "AP"} if side else {}, incomplete=incomplete,
    ),
    st.lists(labels, min_size=1, max_size=8),
    st.integers(0, 10**9),
    st.sampled_from(TAXONOMY.names("modalities")),
    st.sampled_from([name for name in TAXONOMY.names("departments") if "Pathology" not in name]),
    st.sampled_from(["", "left", "right"]),
    st.lists(st.sampled_from(VOCABULARY), max_size=2, unique=True),
    st.none() | st.sampled_from(TAXONOMY.names("clinical_tasks")),
)  # fmt: skip


@settings(max_examples=300)
@example(
    record(Label("spleen"), name="1", modality="Fundus photography", attributes={"side": "left"}), 0
)  # the side is of another organ
@given(records, st.integers(0, 5))
def test_the_checks_accept_every_template(of, seed):
    for item, made in conversations(of, seed=seed):
        problems = check(made, Task(item, of, CONTEXT), TAXONOMY, CheckOptions())
        assert not problems, (item, made, problems)


@settings(max_examples=100)
@given(records)
def test_the_form_of_a_conversation(of):
    ids = [item.id for item, _ in conversations(of)]
    assert len(set(ids)) == len(ids)
    for item, made in conversations(of):
        assert item.id.startswith(f"{of.id}#{item.form}")
        assert [turn.speaker for turn in made] == ["human", "gpt"] * (len(made) // 2)
        marks = [turn.text.count(IMAGE) for turn in made]
        assert marks == (
            [0] * len(made) if item.form in TEXT_FORMS else [1] + [0] * (len(made) - 1)
        )
        assert not any("{" in turn.text for turn in made)


def test_another_seed_makes_another_text():
    of = record(Label("edema"))
    texts = {tuple(made for _, made in conversations(of, seed=seed)) for seed in range(5)}
    assert len(texts) == 5


@settings(max_examples=200)
@given(boxes, st.integers(1, 3000), st.integers(1, 3000))
def test_a_written_box_holds_the_box(box, more, further):
    size = {"width": 640 + more, "height": 480 + further}
    (read,) = read_boxes(write_box(box, **size), **size)
    sides = (*size.values(),) * 2
    assert all(abs(a - b) * 1000 <= side for a, b, side in zip(read, box, sides, strict=True))


def test_numbers_of_each_form():
    make = MakeOptions(
        caption=1, region_caption=0, instruction=0.5, dialogue=0.25, perception=2, text_single=0,
        text_multi=0.1, chinese=0.3,
    )  # fmt: skip
    forms, languages = Counter(), Counter()
    for number in range(4000):
        for item in plan(record(Label("edema"), name=str(number)), CONTEXT, make, seed=3):
            forms[item.form] += 1
            languages[item.language] += 1
    assert forms["caption"] == 4000
    assert forms["perception"] == 8000
    assert "region_caption" not in forms
    assert "text_single" not in forms
    # four standard deviations
    assert abs(forms["instruction"] - 2000) < 127
    assert abs(forms["dialogue"] - 1000) < 110
    assert abs(forms["text_multi"] - 400) < 76
    total = languages.total()
    assert abs(languages["zh"] - 0.3 * total) < 4 * (0.21 * total) ** 0.5


def test_a_record_whose_label_has_no_chinese_name_is_told_in_english():
    context = SourceContext("toy", "Toy", VOCABULARY, {}, {"edema": "水肿"})
    make = MakeOptions(chinese=1)
    assert {item.language for item in plan(record(Label("edema")), context, make, seed=0)} == {"zh"}
    assert {item.language for item in plan(record(Label("nodule")), context, make, seed=0)} == {
        "en"
    }


def perceptions(kind, *labels, context=CONTEXT, count=400, **options):
    make = MakeOptions(
        caption=0, region_caption=0, instruction=0, dialogue=0, perception=1, text_single=0, text_multi=0,
        chinese=0, perception_kinds=[kind], **options,
    )  # fmt: skip
    for number in range(count):
        for item, made in conversations(record(*labels, name=str(number)), make, context):
            yield item, made[0].text.removeprefix("<image>\n"), made[1].text


def test_right_letters_are_spread_evenly_and_right():
    letters = Counter()
    for _, question, answer in perceptions("multiple_choice", Label("edema"), count=2000):
        lines = dict(line.split(". ", 1) for line in question.splitlines()[1:-1])
        assert lines[answer] == "edema"
        assert len(set(lines.values())) == len(lines) == 4
        letters[answer] += 1
    assert set(letters) == set("ABCD")
    assert all(abs(count - 500) < 78 for count in letters.values())


def test_yes_and_no_are_balanced_and_right():
    said = Counter()
    for _, question, answer in perceptions("yes_no", Label("edema"), count=2000):
        assert ("edema" in question) == (answer == "Yes")
        said[answer] += 1
    assert abs(said["Yes"] - 1000) < 90


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        ("nodule", "lung nodule"),
        ("heart", "heart_atrium_left"),
        ("kidneys", "kidney_left"),
        ("肺", "左肺"),
    ],
)
def test_what_a_picture_lacks_is_never_a_part_of_what_it_has(whole, part):
    context = SourceContext("toy", "Toy", names := ("mass", whole, part), known=names)
    for name in (whole, part):
        assert absent(record(Label(name)), context, EN) == ["mass"]


def test_a_further_name_of_a_label_is_not_denied_beside_it():
    names = ("cardiomegaly", "enlarged heart", "mass")
    further = {"cardiomegaly": ("enlarged heart",)}
    context = SourceContext("toy", "Toy", names, further, known=names)
    assert absent(record(Label("cardiomegaly")), context, EN) == ["mass"]
    assert absent(record(Label("enlarged heart")), context, EN) == ["mass"]


NEED_COMPLETENESS = {"yes_no", "multiple_choice", "counting", "detection", "localisation"}


@pytest.mark.parametrize(
    ("known", "examined", "by_image", "asked"),
    [
        ((), (), True, set()),
        (VOCABULARY, (), False, NEED_COMPLETENESS),
        ((), ("*",), True, NEED_COMPLETENESS),
        ((), ("*",), False, set()),
        (("edema",), (), True, {"yes_no", "multiple_choice"}),
        ((), ("platelet",), True, {"counting", "detection", "localisation"}),
    ],
)
def test_only_what_somebody_looked_for_is_denied_or_counted(known, examined, by_image, asked):
    context = replace(CONTEXT, known=known, by_image=by_image)
    of = replace(record(Label("platelet", (0, 0, 9, 9))), examined=examined)
    kinds = {item.kind for item in plan(of, context, MakeOptions(perception=9), seed=0)}
    assert kinds & NEED_COMPLETENESS == asked
    assert not NEED_COMPLETENESS & {
        item.kind
        for item in plan(replace(of, incomplete=("*",)), context, MakeOptions(perception=9), seed=0)
    }


@pytest.mark.parametrize(
    ("names", "of", "known"),
    [
        (("polyp", "adenomatous polyp"), {"polyp"}, {"polyp", "adenomatous polyp"}),
        (("polyp", "adenomatous polyp"), {"polyp", "adenomatous polyp"}, {"adenomatous polyp"}),
        (("Cyst", "cyst", "ulcer"), {"Cyst", "cyst"}, {"ulcer"}),
        (("kidney", "kidney tumour"), {"kidney", "kidney tumour"}, {"kidney", "kidney tumour"}),
        (("左肾", "肾"), {"左肾", "肾"}, {"左肾"}),
    ],
)
def test_what_is_of_a_kind_counts_as_that_kind_too(names, of, known):
    context = SourceContext("toy", "Toy", tuple(sorted(names)), known=names)
    held = record(*(Label(name, (0, 0, 9, 9)) for name in sorted(of)))
    assert context.known_in(held) == known
    lacks = replace(context, known=("polyp",))  # nobody looked for adenomatous ones
    assert not {"polyp", "adenomatous polyp"} <= {*names} or not lacks.known_in(held)


def test_a_label_of_the_whole_image_may_be_another_region_than_those_with_a_box():
    held = record(Label("edema", (0, 0, 9, 9)), Label("edema"))
    assert "edema" not in replace(CONTEXT, known=VOCABULARY).known_in(held)


def test_of_a_set_of_one_label_nothing_is_denied():
    lonely = SourceContext("toy", "Toy", ("edema",), known=("edema",))
    items = plan(record(Label("edema")), lonely, MakeOptions(perception=9), seed=0)
    assert not {"yes_no", "multiple_choice"} & {item.kind for item in items}


def test_a_detection_lists_every_box_in_reading_order():
    found = [
        Label("platelet", (320, 240, 640, 480)),
        Label("edema", (0, 0, 10, 10)),
        Label("platelet", (0, 0, 64, 48)),
    ]
    answers = {}
    for _, question, answer in perceptions("detection", *found):
        answers["platelet" if "platelet" in question else "edema"] = answer
    assert answers == {
        "platelet": "[0, 0, 100, 100], [500, 500, 1000, 1000]",
        "edema": "[0, 0, 16, 21]",
    }


def test_too_many_boxes_are_not_asked_for():
    many = [Label("platelet", (at, 0, at + 1, 1)) for at in range(5)]
    edema = Label("edema", (0, 0, 9, 9))
    for labels, most, asked in ((many, 4, 0), (many, 5, 20), ([*many, edema], 4, 20)):
        found = list(perceptions("detection", *labels, max_boxes=most, count=20))
        assert len(found) == asked
        assert all(labels[-1].name in question for _, question, _ in found)


def test_counts_and_places():
    found = [
        Label("platelet", (0, 0, 10, 10)),
        Label("platelet", (0, 0, 9, 9)),
        Label("edema", (0, 330, 10, 470)),
    ]
    counted = {
        "platelet" if "platelets" in question else "edema": answer
        for _, question, answer in perceptions("counting", *found)
    }
    assert counted == {"platelet": "2", "edema": "1"}
    places = {answer for _, _, answer in perceptions("localisation", *found)}
    assert places == {"In the lower left part of the image"}


def test_a_caption_word_for_word():
    of = record(Label("normal"), Label("nodule", (0, 0, 10, 10)), attributes={"view": "AP"})
    assert (
        "This is an anteroposterior CT image. It is classified as normal. "
        "A nodule is visible in the upper left part of the image."
    ) in said(of, caption=1)


@pytest.mark.parametrize(
    ("form", "cases"),
    [
        ("a", {"CT image": "a CT image", "MR image": "an MR image", "X-ray image": "an X-ray image",
               "OCT image": "an OCT image", "ultrasound image": "an ultrasound image", "uterus": "a uterus",
               "electron micrograph": "an electron micrograph", "unilateral x": "a unilateral x"}),
        ("A", {"MR image": "An MR image"}),
        ("the", {"spleen": "the spleen", "other organ": "other organ"}),
        ("The", {"spleen": "The spleen", "no tumor": "No tumor"}),
        ("inside", {"Scintigraphy": "scintigraphy", "Fundus photography": "fundus photography",
                    "X-ray": "X-ray", "OCT": "OCT", "Slit-lamp photography": "slit-lamp photography"}),
    ],
)  # fmt: skip
def test_grammatical_forms(form, cases):
    assert {words: f"{Word(words):{form}}" for words in cases} == cases


def test_every_language_has_every_sentence():
    """A field that a language doesn't use is none of the caller's business, an unknown one is a fault."""

    def fields(said):
        texts = said if isinstance(said, tuple) else (said,)
        return {name for text in texts for _, name, _, _ in Formatter().parse(text) if name}

    assert EN.sentences.keys() == ZH.sentences.keys()
    for key, said in EN.sentences.items():
        own = {"name", "measure", "regions", "image", "english", "chinese"}
        assert fields(ZH.sentences[key]) <= fields(said) | own, key


# Version 1 of each form as it was first released.
DIGESTS = {
    "caption": "ba32ee91ada89381",
    "region_caption": "b40293e0820078f7",
    "instruction": "33ff9df1a4067c70",
    "dialogue": "b16d9e7681111c09",
    "perception": "631ca1d26fac9508",
    "text_single": "39af503fdf437fa3",
    "text_multi": "dc93ed85b2ff77f7",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_changed_sentence_raises_the_version_of_its_form(form):
    """Whoever changes what a form says raises FORM_VERSIONS and writes the new digest down here."""
    digest = hashlib.sha256()
    for number in range(120):
        of = record(
            *[
                Label(
                    VOCABULARY[(number + at) % 7],
                    (at * 60, at * 40, at * 60 + 50, 480) if (number >> at) % 2 else None,
                    None,
                    {"side": "left"} if number % 5 == 0 else {},
                )
                for at in range(1 + number % 6)
            ],
            name=str(number),
            modality=TAXONOMY.names("modalities")[number % len(TAXONOMY.names("modalities"))],
            department="None" if number % 4 == 0 else "Hematology",
            attributes={"view": "AP"} if number % 3 == 0 else {},
            incomplete=("spleen",) if number % 8 == 0 else (),
        )
        for item, made in conversations(of, seed=number):
            if item.form == form:
                digest.update(repr((item.language, made)).encode())
    version = 6 if form in ("caption", "instruction", "dialogue") else 7
    assert (FORM_VERSIONS[form], digest.hexdigest()[:16]) == (version, DIGESTS[form])


def test_lists_and_places():
    assert list(map(EN.listed, ("a", "ab", "abc"))) == ["a", "a and b", "a, b and c"]
    right, corner = (600, 200, 640, 280), (0, 470, 10, 480)
    assert EN.where([right], 640, 480) == "the right part of the image"
    assert EN.where([right, corner], 640, 480) == "the right and lower left parts of the image"
    assert ZH.where([right, corner], 640, 480) == "图像右侧、图像左下部"


@pytest.mark.parametrize(
    ("box", "english", "chinese"),
    [
        ((10, 10, 630, 470), "nearly the whole image", "图像的绝大部分"),
        ((20, 60, 360, 420), "much of the left half of the image", "图像左半部的大部分"),
        ((160, 100, 480, 380), "a large central area of the image", "图像中部的大片区域"),
        ((0, 0, 400, 300), "much of the upper left of the image", "图像左上方的大片区域"),
        ((60, 10, 600, 90), "a band across the upper part of the image", "图像上部的横向区域"),
        ((300, 0, 360, 470), "a strip down the middle of the image", "图像中线附近的纵向区域"),
    ],
)
def test_a_structure_of_half_the_image_has_no_small_place(box, english, chinese):
    assert EN.where([box], 640, 480) == english
    assert ZH.where([box], 640, 480) == chinese


@pytest.mark.parametrize(
    ("modality", "attributes", "part", "english", "chinese"),
    [
        ("CT", {"body part": "abdomen"}, {"axis": "z", "slice": 4},
         "axial CT image of the abdomen", "腹部轴位CT图像"),
        ("MR", {"body part": "lspine"}, {"axis": "x"},
         "sagittal MR image of the lumbar spine", "腰椎矢状位磁共振图像"),
        ("X-ray", {"body part": "chest", "view": "PA"}, {},
         "posteroanterior radiograph of the chest", "胸部后前位X光片"),
        ("Mammography", {"side": "left", "view": "MLO"}, {},
         "mediolateral oblique mammogram of the left breast",
         "左侧乳腺内外斜位钼靶片"),
        ("Fundus photography", {"laterality": "R"}, {}, "fundus photograph of the right eye",
         "右眼眼底照片"),
        ("CT", {"body part": "chest", "side": "left"}, {}, "CT image of the chest", "胸部CT图像"),
        ("CT", {"body part": "bucket"}, {}, "CT image", "CT图像"),
    ],
)  # fmt: skip
def test_an_image_is_called_by_its_plane_view_side_and_part(
    modality, attributes, part, english, chinese
):
    of = record(Label("edema"), modality=modality, attributes=attributes)
    of = replace(of, provenance=replace(of.provenance, part=part))
    for code, said in (("en", english), ("zh", chinese)):
        task = Task(Item(f"{of.id}#caption", "caption", code), of, CONTEXT)
        assert Teller(task, TAXONOMY).image() == said


def test_chinese_counts_things_in_their_own_measures():
    measures = {"platelet": "个", "forceps": "把", "rib": "根", "tooth": "颗", "edema": "处"}
    assert {name: ZH.measure(name) for name in measures} == measures


def test_what_was_left_out_is_neither_counted_nor_denied():
    """A speck that the rules drop, or a box that can't be read, is in the picture all the same."""
    found = [Label("platelet", (0, 0, 10, 10)), Label("platelet", (600, 0, 640, 9))]
    one = [Label("edema", (0, 330, 10, 470))]
    full = record(*found, *one)
    cut = record(*found, *one, incomplete=("platelet", "spleen"))
    ours = MakeOptions(
        caption=4, region_caption=9, instruction=8, dialogue=6, perception=9, chinese=0.4,
        dialogue_turns=(4, 8),
    )  # fmt: skip

    def texts(of):
        for seed in range(60):
            for item, made in conversations(of, ours, seed=seed):
                yield item, " ".join(turn.text for turn in made)

    counts = ("wo platelets", "两个血小板", "platelets are there")
    assert any(words in text for _, text in texts(full) for words in counts)
    for item, text in texts(cut):
        assert not any(words in text for words in counts), text
        if item.kind in ("detection", "counting", "localisation"):
            assert "edema" in text or "水肿" in text
        if item.kind in ("yes_no", "multiple_choice"):
            assert "spleen" not in text
            assert "脾脏" not in text
    assert any("shows platelets" in text for _, text in texts(cut))
    assert absent(cut, CONTEXT, EN) == absent(full, CONTEXT, EN)[:-1]


def test_articles_of_regions():
    one = said(record(Label("spleen", (0, 0, 64, 48))), region_caption=1)
    assert (
        "This region, in the upper left part of the image, shows the spleen. It spans about 10% of "
        "the image's width and about 10% of its height."
    ) in one
    two = record(*[Label("platelet", (at, 0, at + 9, 9)) for at in (0, 20)])
    several = said(two, region_caption=1)
    assert any("shows one of the two platelets." in text for text in several)
    asked = said(record(Label("spleen", (0, 0, 64, 48))), perception=1)
    assert {"Does this image show the spleen?", "Where in the image is the spleen?"} <= {
        text.removeprefix("<image>\n") for text in asked
    }
    marks = {"truncated": "yes", "difficult": "yes", "side": "left"}
    marked = said(record(Label("spleen", (0, 0, 64, 48), None, marks)), region_caption=1)
    assert any("It is on the patient's left side." in text for text in marked)
    assert not any("ifficult" in text or "runcated" in text for text in marked)
    whole = said(record(Label("edema", (0, 0, 640, 240))), region_caption=1)
    assert any("It spans all of the image's width and about 50%" in text for text in whole)


@pytest.mark.parametrize(
    ("label", "task", "said"),
    [
        ("spleen", None, {"The image shows the spleen.", "The spleen can be seen in it."}),
        (
            "right femur",
            None,
            {"The image shows the right femur.", "The right femur can be seen in it."},
        ),
        (
            "platelet",
            "Cell Recognition",
            {"The image shows a platelet.", "A platelet can be seen in it."},
        ),
        ("edema", "Disease Diagnosis", {"The finding is edema.", "The image shows edema."}),
        ("melanoma", None, {"The finding is a melanoma.", "The image shows a melanoma."}),
        ("benign", "Disease Diagnosis", {"It is classified as benign.", "Its class is benign."}),
        ("grade 2", "Severity Grading", {"It is graded as grade 2."}),
        ("lateral view", None, {"It is a lateral view."}),
        ("no finding", None, {"The image shows no finding."}),
    ],
)
def test_organs_and_cells_are_shown_findings_found_and_classes_named(label, task, said):
    of = record(Label(label), task=task)
    tasks = (Task(Item(of.id, "caption", "en", seed=n), of, CONTEXT) for n in range(30))
    assert {Teller(task, TAXONOMY).classified([label]) for task in tasks} == said


def test_the_only_organ_is_named_by_what_the_image_is_called():
    """And a text without an image is a question with its answer, not the same sentence twice."""
    of = replace(record(Label("spleen"), task="Organ Recognition - Abdomen"), incomplete=())
    make = dict.fromkeys(FORMS, 0) | {"chinese": 0}
    for seed in range(30):
        for _, made in conversations(of, MakeOptions(**make | {"caption": 1}), seed=seed):
            assert made[1].text.endswith("CT image of the spleen.")
        for _, made in conversations(of, MakeOptions(**make | {"text_single": 1}), seed=seed):
            assert made[1].text not in made[0].text


def test_no_finding_is_no_finding():
    """And the checks take it for the label that it is."""
    context = SourceContext("toy", "Toy", ("no finding", "pneumothorax"), {}, {})
    texts = set()
    for seed in range(60):
        for item, made in conversations(record(Label("no finding")), context=context, seed=seed):
            texts |= {turn.text for turn in made}
            task = Task(item, record(Label("no finding")), context)
            assert not check(made, task, TAXONOMY, CheckOptions())
    told = " ".join(texts)
    assert "The image shows no finding." in told
    wrong = ("finding is no finding", "Is no finding", "findings in it: no", "in this image: no")
    assert not any(words in told for words in wrong)


def test_pairs_altered_anatomy_and_numbered_parts_are_said_as_one_says_them():
    assert [spoken(one) for one in ("rib_left_9", "vertebrae_L1")] == ["left rib 9", "L1 vertebra"]
    assert indefinite("forceps") == "a pair of forceps"
    assert indefinite("forceps", several=True) == "pairs of forceps"
    assert indefinite("impacted tooth 38", several=True) == "an impacted tooth 38"
    assert indefinite("melanocytic nevus", several=True) == "melanocytic nevi"
    assert kinds_among(("tooth", "tooth 38", "grade 1", "grade 2")) == {"tooth": {"tooth 38"}}
    kinds = {one: noun(one).kind for one in ("mediastinum", "enlarged mediastinum", "cardiomegaly")}
    assert kinds == {
        "mediastinum": "anatomy",
        "enlarged mediastinum": "finding",
        "cardiomegaly": "condition",
    }


def test_organs_at_one_place_share_a_sentence():
    box = (0, 0, 64, 48)
    told = " ".join(said(record(Label("spleen", box), Label("stomach", box)), caption=1))
    assert "The spleen and the stomach are visible in the upper left part of the image." in told
