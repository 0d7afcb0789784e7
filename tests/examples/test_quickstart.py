# SPDX-License-Identifier: Apache-2.0

"""The quickstart's corpus: true labels, and not one pixel in both training and held-out set."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import corpus
import numpy as np
import pytest
import report
import run
import sources
from PIL import Image
from report import chance_level
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gmai_xtuner.checkpoint.tokenizer import load_tokenizer
from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.tokenization import ChatTemplate, ConversationTokenizer
from gmai_xtuner.loading import load_model
from tests.model.exporting import export, predictor_of, stage_config, trained_model


@pytest.fixture(scope="module")
def planes() -> list[sources.Plane]:
    return sources.load_planes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("quickstart") / "corpus"
    corpus.write_corpus(target, seed=0, train=300, heldout=128)
    return target


def read(folder: Path, split: str) -> list[dict]:
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def images_of(record: dict) -> list[str]:
    image = record.get("image", [])
    return [image] if isinstance(image, str) else image


def draw_all(planes: list[sources.Plane], split: str, count: int) -> list[corpus.Crop]:
    cropper = corpus.Cropper(planes, split, generator=np.random.default_rng(0))
    return [cropper.draw(sources.MODALITIES[n % 4]) for n in range(count)]


def test_crops_of_the_splits_share_no_pixel(planes):
    touched: dict[str, dict[tuple[str, int], np.ndarray]] = {}
    for split, count in (("train", 800), ("heldout", 128)):
        masks = touched.setdefault(split, {})
        for crop in draw_all(planes, split, count):
            key = (crop.plane.source, crop.plane.index)
            mask = masks.setdefault(key, np.zeros(crop.plane.pixels.shape[:2], dtype=bool))
            left, top, right, bottom = crop.box
            assert 0 <= left < right <= mask.shape[1]
            assert 0 <= top < bottom <= mask.shape[0]
            mask[top:bottom, left:right] = True
    both = set(touched["train"]) & set(touched["heldout"])
    assert {source for source, _ in both} >= {"skimage-retina", "pydicom-ct-head"}  # it occurs
    for key in both:
        assert not (touched["train"][key] & touched["heldout"][key]).any(), key
    brain = {split: {z for name, z in masks if "brain" in name} for split, masks in touched.items()}
    assert len(brain["train"]) > 10
    assert len(brain["heldout"]) == 4
    assert min(abs(a - b) for a in brain["train"] for b in brain["heldout"]) >= 2


def test_no_stored_image_is_in_both_sets_or_twice(folder):
    seen = Counter(
        Image.open(path).convert("RGB").tobytes() for path in folder.glob("images/*/*/*.png")
    )
    assert len(seen) > 400
    assert max(seen.values()) == 1


def test_no_training_record_names_a_heldout_image(folder):
    names = {
        split: {n for r in read(folder, split) for n in images_of(r)} for split in sources.SPLITS
    }
    assert names["train"].isdisjoint(names["heldout"])
    assert all(name.startswith("train/") for name in names["train"])
    assert all((folder / "images" / name).is_file() for name in names["train"] | names["heldout"])


def test_heldout_crops_are_shown_as_they_are(planes):
    compared = 0
    for crop in draw_all(planes, "heldout", 32):
        left, top, right, bottom = crop.box
        if right - left <= corpus.STORED_SIDE:
            shown = np.asarray(crop.image())
            assert (shown == crop.plane.pixels[top:bottom, left:right]).all()
            compared += 1
    assert compared > 10


def test_the_mixture_names_the_training_set_only(folder):
    text = (folder / "mixture.yaml").read_text(encoding="utf-8")
    assert "annotations: train.jsonl" in text
    assert "heldout.jsonl" not in text


def test_whoever_does_not_look_gets_one_in_four(folder):
    records = read(folder, "heldout")
    turns = [record["conversations"] for record in records]
    assert chance_level([(turn[0]["value"], turn[1]["value"]) for turn in turns]) == 0.25
    assert Counter(record["id"].split("#")[2] for record in records) == dict.fromkeys(
        sources.MODALITIES, 32
    )


def test_every_source_meets_several_wordings(folder):
    met: dict[tuple[str, str], set[str]] = {}
    for split in sources.SPLITS:
        for record in read(folder, split):
            _, form, _, source, *_ = record["id"].split("#")
            if form == "cls":
                met.setdefault((split, source), set()).add(record["conversations"][0]["value"])
    assert len(met) == 12
    assert min(len(questions) for questions in met.values()) >= 3


def test_all_forms_and_both_languages_occur(folder):
    records = read(folder, "train")
    assert len(records) == 300
    forms = Counter(record["id"].split("#")[1] for record in records)
    assert forms == {"cls": 192, "caption": 30, "dialogue": 30, "compare": 30, "qa": 18}
    chinese = sum(not record["conversations"][0]["value"].isascii() for record in records)
    assert 0.15 < chinese / len(records) < 0.35
    assert len({record["id"] for record in records}) == 300


def test_marks_images_and_sizes_agree(folder):
    for record in read(folder, "train") + read(folder, "heldout"):
        turns = record["conversations"]
        names = images_of(record)
        assert turns[0]["value"].count("<image>") == len(names)
        assert not any("<image>" in turn["value"] for turn in turns[1:])
        assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        if len(names) == 1:
            with Image.open(folder / "images" / names[0]) as image:
                assert image.size == (record["width"], record["height"])
            kind, _, modality, source, *path = record["id"].split("#")
            assert (kind, "/".join(path)) == ("2d", names[0])
            assert names[0].split("/")[1:] == [modality, path[-1]]
            assert path[-1].startswith(source)


def test_the_same_seed_writes_the_same_corpus_and_another_another(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        corpus.write_corpus(tmp_path / name, seed=seed, train=40, heldout=16)
    files = {
        name: {
            path.relative_to(tmp_path / name).as_posix(): path.read_bytes()
            for path in (tmp_path / name).rglob("*.*")
        }
        for name in "abc"
    }
    assert files["a"] == files["b"]
    assert files["a"]["train.jsonl"] != files["c"]["train.jsonl"]


def test_head_ct_shows_air_black_brain_gray_and_bone_white(planes):
    brain = next(p for p in planes if p.source == "pydicom-ct-head" and p.window == "brain")
    assert brain.pixels[:8, :8].max() == 0  # padding outside the field of view
    values, header = sources.read_dicom(
        Path(sources.pydicom.__file__).parent / "data/test_files/J2K_pixelrep_mismatch.dcm"
    )
    assert header.BodyPartExamined == "HEAD"
    assert header.Modality == "CT"
    assert set(np.unique(brain.pixels[values > 200])) == {255}
    assert set(np.unique(brain.pixels[values < -100])) == {0}
    assert 100 < np.median(brain.pixels[(values > 20) & (values < 50)]) < 140


def test_ct_values_are_hounsfield_units():
    values, _ = sources.read_dicom(
        Path(sources.pydicom.__file__).parent / "data/test_files/CT_small.dcm"
    )
    assert (values.min(), values.max()) == (-896.0, 1167.0)  # stored 128..2191, intercept -1024


def test_low_values_of_monochrome1_are_bright():
    header = sources.pydicom.Dataset()
    header.PhotometricInterpretation = "MONOCHROME1"
    levels = np.array([[0, 200]], dtype=np.uint8)
    assert sources._grey(levels, header)[0, :, 0].tolist() == [255, 55]


@pytest.mark.parametrize(
    ("left", "right", "expected"), [(90, 10, "left"), (10, 90, "right"), (50, 53, "equal")]
)
def test_brighter_half_is_measured(left, right, expected):
    levels = np.full((6, 7, 3), left, dtype=np.uint8)
    levels[:, 4:] = right
    assert corpus.brighter_half(Image.fromarray(levels)) == expected


def test_overlap_of_two_boxes():
    assert corpus.overlap((0, 0, 2, 2), (1, 0, 3, 2)) == pytest.approx(1 / 3)
    assert corpus.overlap((0, 0, 2, 2), (2, 0, 4, 2)) == 0.0


def test_what_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "old.png").touch()
    with pytest.raises(corpus.CorpusError, match="not empty"):
        corpus.write_corpus(tmp_path)
    with pytest.raises(corpus.CorpusError, match="multiple of 16"):
        corpus.write_corpus(tmp_path / "new", train=4, heldout=20)
    assert corpus.main([str(tmp_path)]) == 1
    assert "not empty" in capsys.readouterr().err


def test_a_missing_picture_says_which_package_lacks_it():
    with pytest.raises(sources.SourceError, match=r"nibabel .* does not carry tests/data/none"):
        sources._carried(sources.nibabel, "tests/data/none.nii")


# --- The quickstart's driver and report on made-up logs: nothing is trained here ---


def write_log(stage_dir: Path, losses: list[float], *, start: str = "20260101_000000") -> None:
    folder = stage_dir / start / "vis_data"
    folder.mkdir(parents=True)
    lines = [
        json.dumps({"loss": loss, "lr": 1e-3, "iter": 5 * (n + 1), "step": 5 * (n + 1)})
        for n, loss in enumerate(losses)
    ]
    lines.insert(1, json.dumps({"tokens_per_second": 10.0, "step": 5}))
    (folder / "scalars.json").write_text("\n".join(lines) + "\n", encoding="utf-8")


def heldout_records() -> list[dict]:
    records = []
    for number, (modality, answer, prediction) in enumerate(
        [("ct", "CT", "CT."), ("mr", "MRI", "CT"), ("ct", "CT", " ct"), ("mr", "MRI", "MRI")]
    ):
        records.append(
            {
                "id": f"2d#cls#{modality}#some#heldout#{modality}#{number}.png",
                "image": f"heldout/{modality}/{number}.png",
                "question": "Name the imaging modality.",
                "answer": answer,
                "prediction": prediction,
            }
        )
    return records


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A work dir as a run leaves it."""
    write_log(tmp_path / "stage1", [6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    write_log(tmp_path / "stage2", [2.0, 1.0])
    write_log(tmp_path / "stage3", [9.0])
    (tmp_path / "stage3" / "last_checkpoint").write_text("some/iter_7.pth", encoding="utf-8")
    timings = {"bases": 1.0, "stage1": 10.0, "stage2": 20.0, "stage3": 30.0}
    (tmp_path / "timings.json").write_text(json.dumps(timings), encoding="utf-8")
    lines = [json.dumps(record) + "\n" for record in heldout_records()]
    (tmp_path / "predictions.jsonl").write_text("".join(lines), encoding="utf-8")
    for record in heldout_records():
        path = tmp_path / "corpus" / "images" / record["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), "gray").save(path)
    return tmp_path


def test_report_has_each_stage_the_accuracy_and_chance(finished, capsys):
    written = report.write_report(finished)
    assert written == json.loads((finished / "report.json").read_text(encoding="utf-8"))
    assert written["stages"]["stage1_shallow"] == {
        "loss_first": 5.0,
        "loss_last": 1.0,
        "iterations": 35,
        "seconds": 10.0,
    }
    assert written["stages"]["stage2_deep"]["loss_first"] == 2.0
    assert written["stages"]["stage2_deep"]["loss_last"] == 1.0
    assert written["stages"]["stage3_instruct"]["loss_last"] == 9.0
    assert written["stages"]["stage3_instruct"]["iterations"] == 7
    assert (written["heldout_accuracy"], written["chance"], written["seconds"]) == (0.75, 0.5, 61.0)
    assert [record["correct"] for record in written["heldout"]] == [True, False, True, True]
    table = capsys.readouterr().out
    assert "stage1_shallow         5.000       1.000          35       10" in table
    assert "wrong: MRI" in table
    with Image.open(finished / "answers.png") as picture:
        assert picture.width > 800


def test_a_resumed_run_continues_its_log(tmp_path):
    write_log(tmp_path, [3.0, 2.0, 1.0])
    write_log(tmp_path, [3.0, 0.5], start="20260101_000100")  # from its second entry on
    assert report.read_losses(tmp_path) == [(5, 3.0), (10, 0.5), (15, 1.0)]


def test_a_stage_without_a_log_is_an_error(finished, capsys):
    (next((finished / "stage2").glob("*/vis_data")) / "scalars.json").unlink()
    assert report.main([str(finished)]) == 1
    assert "the stage did not train" in capsys.readouterr().err


def test_chance_counts_each_wording_by_itself():
    pairs = [("a?", "x"), ("a?", "y"), ("b?", "y"), ("b?", "Y.")]
    assert report.chance_level(pairs) == 0.75


def test_a_command_that_is_not_there_says_what_to_run(tmp_path):
    with pytest.raises(run.StepError, match="make env"):
        run.run_command(["no-such-tool"], tmp_path / "x.log", environment={"PATH": str(tmp_path)})


def test_a_corpus_is_written_anew_only_if_it_is_not_whole(monkeypatch, tmp_path):
    corpus = tmp_path / "corpus"

    def write(name, command, work_dir):
        assert not corpus.exists()
        corpus.mkdir()
        (corpus / "train.jsonl").write_text(name)

    monkeypatch.setattr(run, "run_step", write)
    for _ in range(2):  # the first one is stopped before the last file
        run.write_corpus(tmp_path)
    (corpus / "mixture.yaml").touch()
    monkeypatch.setattr(run, "run_step", None)
    run.write_corpus(tmp_path)
    assert (corpus / "train.jsonl").read_text() == "corpus"


def test_children_find_this_python_first_and_no_hub(tmp_path):
    environment = run.child_environment(tmp_path)
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["HF_HUB_OFFLINE"] == "1"


def test_settings_of_a_stage_have_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "OVERRIDES", {"all": {"a.b": 1, "c": 2}, "stage1": {"c": False}})
    assert run.train_command(tmp_path)[-3:] == ["a.b=1", "c=2", "stage1.c=False"]


def test_a_training_that_does_not_finish_stops_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "run_step", lambda *_: None)
    monkeypatch.setattr(run, "train_command", lambda _: ["python", "-c", "raise SystemExit(3)"])
    with pytest.raises(run.StepError, match="gmai-train ended with code 3"):
        run.run(tmp_path / "new")


# --- A language model whose bos token opens its turns, as SmolLM2's does, by naming it ---


def test_a_bos_token_that_opens_each_turn_is_written_once(tiny_bases, tokenizer, tmp_path):
    """A plain Llama folder; its prompts, its end and its export are right with add_bos=False alone."""
    named = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<unk>", pad_token="</s>",
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=1536, hidden_size=96, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True,
        bos_token_id=1535, eos_token_id=1534,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llm")
    named.save_pretrained(tmp_path / "llm")
    (tmp_path / "vision").symlink_to(tiny_bases / "vision")
    base = load_tokenizer(str(tmp_path / "llm"))
    with pytest.raises(GMAIError, match=r"begin with it twice. Set .*add_bos=False"):
        ConversationTokenizer.from_pretrained(base, ChatTemplate.from_xtuner("internlm2_chat"))

    cfg = stage_config(tmp_path, "stage3_instruct")
    cfg.train_dataloader.dataset.add_bos = False
    model = trained_model(cfg)
    predictor = predictor_of(model, tmp_path, add_bos=False)
    turns = (Turn("user", "Is it CT?"),)
    assert predictor.encoder.encode_prompt(turns).tolist().count(1535) == 2  # user, assistant
    assert set(predictor.stop_ids) == {1534}
    again = load_model(export(model, cfg, tmp_path / "export"))
    pixels = np.zeros((336, 336, 3), np.uint8)
    from PIL import Image

    images = [Image.fromarray(pixels)]
    asked = {"max_new_tokens": 8}
    assert again.answer("What?", images, **asked) == predictor.answer("What?", images, **asked)
