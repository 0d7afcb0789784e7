# SPDX-License-Identifier: Apache-2.0

import json
import re
from pathlib import Path

import pytest
import yaml
from xtuner.registry import BUILDER

from gmai_xtuner.data import plan, token_cache
from gmai_xtuner.data.sampler import MicroBatchSampler, PackSampler
from gmai_xtuner.preflight.report import as_json, as_text
from tests.toy import Corpus, record

SMALL = {
    "train_dataloader.dataset.max_length": 256,
    "train_dataloader.batch_size": 2,
    "optim_wrapper.accumulative_counts": 2,
}


def problems(found, level: str = "fail") -> str:
    return "\n".join(f"{finding.about}: {finding.text}" for finding in found.findings.of(level))


def edit_mixture(corpus: Corpus, name: str, **fields) -> None:
    mixture = yaml.safe_load(corpus.mixture.read_text())
    mixture["datasets"].setdefault(name, {}).update(fields)
    corpus.mixture.write_text(yaml.safe_dump(mixture, sort_keys=False))


def test_good_data_are_planned_as_training_plans_them(preflight, corpus):
    found = preflight(corpus.mixture, options=SMALL, gpus=2, throughput=100.0)
    assert problems(found) == ""
    data = found.summary
    dataset = BUILDER.build(found.run.dataset)
    epoch = dataset.plan.epoch(0)
    assert (data.packs, data.conversations, data.images) == (len(epoch.packs), 30, 20)
    assert data.tokens == epoch.total("tokens").sum()
    assert data.fill == pytest.approx(data.tokens / (data.packs * 256))
    assert data.images_per_pack_max == epoch.total("images").max()
    assert data.packs == 10
    # 2 GPUs x 2 packs: three micro-batches, the last of them a step of its own
    assert (data.iterations_per_epoch, data.steps_per_epoch) == (3, 2)
    assert found.hours == pytest.approx(data.tokens / (100 * 2) / 3600)
    rows = {row.name: row for row in data.datasets}
    assert (rows["a"].records, rows["a"].conversations, rows["a"].images) == (15, 15, 10)
    assert sum(row.tokens for row in data.datasets) == data.tokens


def test_fullest_micro_batch_is_the_samplers(preflight, corpus):
    found = preflight(corpus.mixture, options=SMALL, gpus=2)
    dataset = BUILDER.build(found.run.dataset)
    images = dataset.plan.epoch(0).total("images")
    most = 0
    for rank in range(2):
        sampler = MicroBatchSampler(
            PackSampler(dataset), 2, accumulative_counts=2, rank=rank, world_size=2
        )
        for refs in sampler:
            most = max(most, sum(int(images[ref.pack]) for ref in refs if not ref.filler))
    assert found.summary.images_per_micro_batch_max == most


def test_training_starts_with_the_caches_and_the_plan(preflight, corpus, monkeypatch):
    found = preflight(corpus.mixture, options=SMALL)
    assert found.survey.built == ["a", "b"]
    monkeypatch.setattr(token_cache, "_build", None)
    monkeypatch.setattr(plan, "pack", None)
    assert len(BUILDER.build(found.run.dataset)) == found.summary.packs
    assert preflight(corpus.mixture, options=SMALL).survey.built == []


@pytest.mark.parametrize(
    ("train_cfg", "iterations", "steps"),
    [
        ({"max_epochs": 2}, 6, 4),
        ({"max_epochs": 2.5}, 8, 5),
        ({"max_epochs": None, "max_iters": 4}, 5, 3),  # rounded up to the end of a step
    ],
)
def test_length_of_the_run(preflight, corpus, train_cfg, iterations, steps):
    found = preflight(corpus.mixture, options={**SMALL, "train_cfg": train_cfg}, gpus=2)
    assert found.summary.iterations_per_epoch == 3
    assert (found.summary.iterations, found.summary.steps) == (iterations, steps)


def test_every_missing_dataset_is_named_and_the_rest_planned(preflight, corpus):
    for number in range(25):
        edit_mixture(corpus, f"lost{number}", annotations=f"lost{number}.jsonl")
    edit_mixture(corpus, "b", image_root="nowhere")
    found = preflight(corpus.mixture, options=SMALL)
    assert [missing.name for missing in found.survey.missing] == [
        "b",
        *(f"lost{number}" for number in range(25)),
    ]
    assert found.summary.conversations == 15
    assert "missing datasets (26): b, lost0" in problems(found)
    report = as_json(found)
    assert report["verdict"] == "would fail"
    assert len(report["missing"]["datasets"]) == 26
    assert report["missing"]["datasets"][0]["paths"][0].endswith("nowhere")
    text = as_text(found)
    assert "lost18" in text
    assert "... and 6 more (all in --json)" in text
    # Training will ask for another plan.
    assert not list((Path(found.run.dataset["cache_dir"]) / "plans").iterdir())


def test_the_plan_of_a_running_job_stays(preflight, corpus):
    """A job that trains on ``a`` alone has the plan that is left when ``b`` is missing."""
    edit_mixture(corpus, "b", ratio=0)
    job = BUILDER.build(preflight(corpus.mixture, options=SMALL).run.dataset)
    files = sorted(path.name for path in job.plan.folder.iterdir())
    edit_mixture(corpus, "b", ratio=1, annotations="gone.jsonl")
    found = preflight(corpus.mixture, options=SMALL)
    assert found.survey.incomplete
    assert sorted(path.name for path in job.plan.folder.iterdir()) == files
    job.plan.epoch(1)


def test_nothing_there_at_all(preflight, corpus):
    for name in ("a", "b"):
        edit_mixture(corpus, name, annotations="gone.jsonl")
    found = preflight(corpus.mixture, options=SMALL)
    assert found.summary is None
    assert len(found.survey.missing) == 2
    assert as_json(found)["packs"] is None
    assert "Data: could not be planned" in as_text(found)
    assert as_json(found)["memory_gib"]["total"] > 0  # of the worst case


def test_bad_records_are_all_told_and_the_rest_planned(preflight, corpus):
    lines = corpus.annotations("a").read_text().splitlines()
    bad = [record(f"bad{i}", "<image>?", "Yes.", image=f"gone{i}.png") for i in range(30)]
    corpus.annotations("a").write_text("\n".join([*lines, *map(json.dumps, bad), "{"]) + "\n")
    corpus.annotations("b").write_text("[]\n")
    found = preflight(corpus.mixture, options=SMALL)
    assert found.summary.conversations == 15  # of a; b has no usable record
    assert "a has bad records, 31 (30 missing_image, 1 not_json)" in problems(found)
    assert "b has bad records, 1 (1 not_an_object)" in problems(found)
    report = as_json(found)
    assert [row["dataset"] for row in report["bad_records"]] == ["a", "b"]
    assert len(report["bad_records"][0]["records"]) == 31
    assert {"dataset": "a", "image": "gone29.png"} in report["missing"]["images"]
    assert len(report["missing"]["images"]) == 30
    text = as_text(found)
    assert "(missing_image)" in text
    assert "(not_an_object)" in text  # of b
    _, remedies = text.split("What to do about bad records\n")
    assert remedies.count("drop the record") == 1  # for 30 records
    option = "--cfg-options train_dataloader.dataset.on_bad_sample=skip"
    assert remedies.split("\n\n")[0].count(option) == 1


def test_what_skip_leaves_out_is_no_failure(preflight, corpus):
    with corpus.annotations("a").open("a") as file:
        file.write(json.dumps(record("bad", "<image>?", "Yes.", image="gone.png")) + "\n")
    options = {**SMALL, "train_dataloader.dataset.on_bad_sample": "skip"}
    found = preflight(corpus.mixture, options=options)
    assert problems(found) == ""
    assert "a goes without its bad records, 1" in problems(found, "warn")
    assert as_json(found)["missing"]["images"] == [{"dataset": "a", "image": "gone.png"}]


def test_images_that_went_missing_after_the_cache_was_built(preflight, corpus):
    assert problems(preflight(corpus.mixture, options=SMALL)) == ""
    for name in ("3.png", "17.png"):
        (corpus.images / name).unlink()
    found = preflight(corpus.mixture, options=SMALL)
    assert "images that are not there: 2" in problems(found)
    assert as_json(found)["missing"]["images"] == [
        {"dataset": "a", "image": "3.png"},
        {"dataset": "b", "image": "17.png"},
    ]


def test_damaged_pixels_are_found_by_decoding_only(preflight, corpus):
    whole = (corpus.images / "12.png").read_bytes()
    middle = len(whole) // 2
    broken = whole[:middle] + bytes(20) + whole[middle + 20 :]  # header and end mark stay
    (corpus.images / "12.png").write_bytes(broken)
    assert problems(preflight(corpus.mixture, options=SMALL)) == ""
    found = preflight(corpus.mixture, options=SMALL, decode_images=True)
    assert found.decoded == 20
    ((image),) = found.bad_images
    assert (image.dataset, image.image, image.reason) == ("b", "12.png", "damaged_image")
    assert "images that are damaged or of a kind that can't be read: 1" in problems(found)


def test_a_max_length_without_room_for_an_image(preflight, corpus):
    options = {**SMALL, "train_dataloader.dataset.max_length": 64}
    assert "max_length 64 leaves no room" in problems(preflight(corpus.mixture, options=options))


def test_an_unknown_option_of_the_dataset(preflight, corpus):
    options = {**SMALL, "train_dataloader.dataset.max_lenght": 64}
    assert "max_lenght" in problems(preflight(corpus.mixture, options=options))


def test_fewer_packs_than_a_step(preflight, corpus):
    found = preflight(corpus.mixture, options=SMALL, gpus=16)
    assert problems(found) == ""
    told = problems(found, "warn")
    assert "10 packs are fewer than the 64 of one optimiser step" in told
    assert "16 GPUs share 10 packs: 6 GPUs would have nothing to learn" in told
    assert "The run starts all the same; 10 GPUs would do" in told
    assert "1 GPU would have nothing" in problems(
        preflight(corpus.mixture, options=SMALL, gpus=11), "warn"
    )


def test_lists_in_json_say_what_they_leave_out(preflight, corpus, monkeypatch):
    monkeypatch.setattr("gmai_xtuner.preflight.report.IN_JSON", 3)
    for path in corpus.images.iterdir():
        path.unlink()
    found = preflight(corpus.mixture, options=SMALL)
    report = as_json(found)
    assert len(report["missing"]["images"]) == 3
    assert report["missing"]["images_left_out"] == 17


def test_nothing_held_out_is_told_with_the_option_to_raise(preflight, corpus):
    option = "train_dataloader.dataset.held_out"
    told = problems(preflight(corpus.mixture, options={**SMALL, option: 1e-6}), "note")
    assert "nothing is held out of 30 records, so there will be no validation" in told
    (least,) = re.findall(rf"{option}=1e-06 of .* smallest share .* is (\S+) \(--cfg-options", told)
    for share in (0.0, 0.5, float(least)):  # not asked for; asked for and there
        found = preflight(corpus.mixture, options={**SMALL, option: share})
        assert "held out" not in problems(found, "note")


def test_excluded_records_are_counted_and_lines_that_name_nothing_are_told(preflight, corpus):
    (corpus.folder / "leaks.txt").write_text("id: a1\nimage: 12.png\nid: nobody\n")
    corpus.mixture.write_text(corpus.mixture.read_text() + "exclude: leaks.txt\n")
    found = preflight(corpus.mixture, options=SMALL)
    rows = {row.name: row for row in found.summary.datasets}
    assert {name: (row.excluded, row.conversations) for name, row in rows.items()} == {
        "a": (1, 14),
        "b": (1, 14),
    }
    assert (
        "1 line(s) of the exclude lists name nothing that this stage has: id: nobody"
        in problems(found, "warn")
    )
    assert "excluded" in as_text(found)
    assert [row["excluded"] for row in as_json(found)["datasets"]] == [1, 1]


def test_an_exclude_list_that_is_not_there_would_stop_the_run(preflight, corpus):
    corpus.mixture.write_text(corpus.mixture.read_text() + "exclude: gone.txt\n")
    assert "gone.txt can't be read" in problems(preflight(corpus.mixture, options=SMALL))
