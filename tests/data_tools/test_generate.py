# SPDX-License-Identifier: Apache-2.0

import hashlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest
from PIL import Image

from data_tools.command import exit_status
from data_tools.generate import main
from data_tools.store import Store
from tests.data_tools.conftest import command, draw, files_of, generate


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def funnel(folder: Path, source: str = "tissue") -> dict[tuple[str, str], int]:
    rows = json.loads((folder / "summary.json").read_text())["sources"][source]["funnel"]
    return {(row["stage"], row["reason"]): row["count"] for row in rows}


def done(*arguments) -> subprocess.CompletedProcess[str]:
    made = generate(*arguments)
    assert made.returncode == 0, made.stderr
    return made


def test_a_job_becomes_a_corpus(classes, make_job, tmp_path):
    made = done(make_job({}))
    assert "6 records of 6 pictures" in made.stdout
    found = records(tmp_path / "out")
    assert [record["id"] for record in found] == [
        f"2d#cls#microscopy#tissue#{name}"
        for name in (
            "NORM#image 1.png",
            "NORM#image 3.png",
            "NORM#image 5.png",
            "TUM#image 0.png",
            "TUM#image 2.png",
            "TUM#image 4.png",
        )
    ]
    first = found[0]
    assert first["label"] == ["NORM"]
    assert first["provenance"]["file"] == "NORM/image 1.png"
    assert first["provenance"]["group"] == "tissue/NORM/image 1.png"
    source = classes / "NORM" / "image 1.png"
    assert first["provenance"]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert (tmp_path / "out" / first["image"]).read_bytes() == source.read_bytes()
    assert funnel(tmp_path / "out")["read", ""] == 6


def test_it_runs_from_anywhere(classes, make_job):
    run = command(make_job({}), "--dry-run", "--json")
    assert json.loads(subprocess.run(run, cwd="/", capture_output=True, check=True).stdout)


def test_a_second_run_changes_nothing_and_reads_nothing(classes, make_job, tmp_path):
    job = make_job({})
    done(job)
    before = files_of(tmp_path / "out")
    # Were a file read again, it would be found to be no picture; size and time are as they were.
    for path in classes.rglob("*.png"):
        state = path.stat()
        path.write_bytes(b"\0" * state.st_size)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    done(job)
    assert files_of(tmp_path / "out") == before


def test_order_and_bytes_do_not_depend_on_the_number_of_workers(classes, make_job, tmp_path):
    for number in range(6, 40):
        draw(classes / "TUM" / f"image {number}.png", number)
    done(make_job({}))
    done(make_job({}, name="b.yaml", output="two", workers=2))
    one, two = files_of(tmp_path / "out"), files_of(tmp_path / "two")
    one = {name: data.replace(b"job.yaml", b"b.yaml") for name, data in one.items()}
    assert one == two
    assert len(records(tmp_path / "out")) == 40


def test_changed_vanished_and_new_files_are_noticed(classes, make_job, tmp_path):
    job = make_job({})
    done(job)
    draw(classes / "NORM" / "image 1.png", 100)
    (classes / "NORM" / "image 3.png").unlink()
    draw(classes / "NORM" / "image 2.png", 101)
    done(job)
    again = files_of(tmp_path / "out")
    done(job, "--output", tmp_path / "fresh")
    assert again == files_of(tmp_path / "fresh")
    assert [record["provenance"]["file"] for record in records(tmp_path / "out")][:3] == [
        "NORM/image 1.png",
        "NORM/image 2.png",
        "NORM/image 5.png",
    ]


def test_other_options_of_one_source_leave_the_other_source_as_it_was(classes, make_job, tmp_path):
    second = tmp_path / "second"
    shutil.copytree(classes, second)
    for path in second.rglob("*.png"):
        path.write_bytes(path.read_bytes() + b"\0")
    other = {"name": "other", "root": str(second)}
    done(make_job({}, other))
    # Only what is read again can become a dropped record.
    for path in [*classes.rglob("*.png"), *second.rglob("*.png")]:
        state = path.stat()
        path.write_bytes(b"\0" * state.st_size)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (
        generate(make_job({}, other | {"licence": "MIT"})).returncode == 1
    )  # it has no record left
    assert funnel(tmp_path / "out")["record", ""] == 6
    assert funnel(tmp_path / "out", "other")["record", ""] == 0


def test_a_picture_that_was_taken_away_is_made_again_and_a_stray_one_deleted(
    classes, make_job, tmp_path
):
    job = make_job({})
    done(job)
    before = files_of(tmp_path / "out")
    pictures = sorted((tmp_path / "out" / "images").rglob("*.png"))
    pictures[0].unlink()
    pictures[-1].with_name("f" * 32 + ".png").write_bytes(b"stray")
    (tmp_path / "out" / "images" / "00").mkdir(exist_ok=True)
    (tmp_path / "out" / "images" / "00" / f".{'0' * 32}.png.17.part").write_bytes(b"half")
    draw(tmp_path / "out" / "images" / "mine" / "scan.png", 99)  # somebody's
    done(job)
    after = files_of(tmp_path / "out")
    assert after.pop("images/mine/scan.png")
    assert after == before


def test_bad_files_duplicates_and_unclear_labels_are_counted(classes, make_job, tmp_path):
    shutil.copy(classes / "TUM" / "image 0.png", classes / "TUM" / "image 9.png")
    shutil.copy(classes / "TUM" / "image 0.png", classes / "NORM" / "image 8.png")  # another label
    whole = (classes / "TUM" / "image 2.png").read_bytes()
    (classes / "TUM" / "image 2.png").write_bytes(whole[: len(whole) // 2])
    Image.new("L", (9, 9), 7).save(classes / "TUM" / "image 4.png")
    draw(classes / "ODD" / "a.png", 50)
    draw(classes / "DEB" / "a.png", 51)
    labels = {"NORM": "normal mucosa", "TUM": "tumour", "DEB": None}
    done(make_job({"labels": labels}))
    found = funnel(tmp_path / "out")
    assert {key: count for key, count in found.items() if key[0] == "record"} == {
        ("record", ""): 5,
        ("record", "duplicate picture"): 1,
        ("record", "image is truncated"): 1,
        ("record", "picture of one grey level"): 1,
        ("record", "unclear label"): 1,
        ("record", "unknown label"): 1,
    }
    assert found["read", ""] == 10
    assert [r["label"] for r in records(tmp_path / "out")] == [["normal mucosa"]] * 4 + [["tumour"]]


def test_a_group_is_the_expressions_first_group_and_a_path_without_it_is_dropped(
    classes, make_job, tmp_path
):
    done(make_job({"group": r"NORM/image (\d)"}))
    groups = [record["provenance"]["group"] for record in records(tmp_path / "out")]
    assert groups == ["tissue/1", "tissue/3", "tissue/5"]
    assert funnel(tmp_path / "out")["record", "path without the job's `group`"] == 3


def test_limit_and_only(classes, make_job, tmp_path):
    shutil.copytree(classes, tmp_path / "second")
    job = make_job({}, {"name": "other", "root": str(tmp_path / "second")})
    done(job, "--limit", "2")
    assert [r["id"].split("#")[3:] for r in records(tmp_path / "out")] == [
        ["tissue", "NORM", "image 1.png"],
        ["tissue", "NORM", "image 3.png"],
        ["other", "NORM", "image 1.png"],
        ["other", "NORM", "image 3.png"],
    ]
    assert funnel(tmp_path / "out")["read", ""] == 2  # no more than are needed
    done(job, "--only", "other")
    assert {r["provenance"]["source"] for r in records(tmp_path / "out")} == {"other"}
    done(job)
    resumed = files_of(tmp_path / "out")
    done(job, "--output", tmp_path / "fresh")
    assert resumed == files_of(tmp_path / "fresh")


def test_a_limit_counts_units_read_before_in_their_places(classes, make_job, tmp_path):
    job = make_job({})
    done(job)
    draw(classes / "NORM" / "image 2.png", 101)
    draw(classes / "TUM" / "zz.png", 102)
    done(job, "--limit", "2")
    done(job, "--limit", "2", "--output", tmp_path / "fresh")
    assert records(tmp_path / "out") == records(tmp_path / "fresh")
    files = [record["provenance"]["file"] for record in records(tmp_path / "out")]
    assert files == ["NORM/image 1.png", "NORM/image 2.png"]


def test_a_dry_run_writes_nothing_and_shows_three_examples(classes, make_job, tmp_path):
    made = done(make_job({}), "--dry-run", "--json")
    found = json.loads(made.stdout)
    assert not (tmp_path / "out").exists()
    (source,) = found["sources"]
    assert (source["units"], source["records"]) == (6, 6)
    assert found["conversations"] > 0
    assert len(found["examples"]) == 3
    assert all(len(example["conversation"]) >= 2 for example in found["examples"])
    text = done(make_job({}), "--dry-run").stdout
    assert "tissue (image_folder): 6 units" in text


def test_stats(classes, make_job, tmp_path):
    job = make_job({})
    made = generate(job, "--stats")
    assert (made.returncode, made.stdout) == (1, "")
    assert made.stderr.startswith("error: there is nothing in ")
    done(job)
    found = json.loads(done(job, "--stats", "--json").stdout)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert sum(row["accepted"] for row in found["forms"]) == summary["conversations"]["count"] > 6
    assert "6 samples read" in done(job, "--stats").stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--only", "none"], "there is no source 'none'; there are tissue"),
        (["--without-annotations"], "needs a model"),
    ],
)
def test_an_error_is_one_message(classes, make_job, tmp_path, arguments, part):
    made = generate(make_job({}), *arguments)
    assert made.returncode == 1
    assert made.stdout == ""
    assert part in made.stderr
    assert "Traceback" not in made.stderr
    assert made.stderr.count("\n") == 1
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_source_without_a_record_or_without_names_is_an_error(classes, make_job, tmp_path):
    """The other source is made as ever; labels that are codes are in records and in no text."""
    for path in classes.iterdir():
        shutil.copytree(path, tmp_path / "second" / f"Segment_{len(path.name)}")
        shutil.copytree(path, tmp_path / "second" / "None", dirs_exist_ok=True)
        shutil.copytree(path, tmp_path / "second" / "yes", dirs_exist_ok=True)
    shutil.copytree(classes, tmp_path / "third")
    for path in (tmp_path / "third").rglob("*.png"):
        path.write_bytes(b"")
    sources = (
        {},
        {"name": "codes", "root": str(tmp_path / "second")},
        {"name": "empty", "root": str(tmp_path / "third")},
    )
    made = generate(make_job(*sources))
    assert made.returncode == 1
    assert "Traceback" not in made.stderr
    last = made.stderr[made.stderr.index("error: ") :]
    for part in (
        "'codes'",
        "Segment_",
        "'None'",
        "'yes'",
        "codes_are_names",
        "'empty' has no record",
        "(6, such as ",
    ):
        assert part in last
    out = tmp_path / "out"
    assert {record["provenance"]["source"] for record in records(out)} == {"tissue", "codes"}
    text = "".join(path.read_text() for path in out.glob("*.jsonl") if path.name != "records.jsonl")
    assert "tissue" in text
    assert "#codes#" not in text
    meant = generate(make_job({}, sources[1] | {"codes_are_names": True}))
    assert meant.returncode == 0


def test_an_output_that_cannot_be_written_to_is_one_message(classes, make_job, tmp_path):
    (tmp_path / "out").write_text("a file")
    made = generate(make_job({}))
    assert made.returncode == 1
    assert made.stderr.startswith("error: the output folder ")
    assert made.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "data", [b"no database at all, but long enough", b"SQLite format 3\0" + b"x" * 500]
)
def test_a_damaged_state_is_one_message(classes, make_job, tmp_path, data):
    state = tmp_path / "out" / ".work" / "state.sqlite"
    state.parent.mkdir(parents=True)
    state.write_bytes(data)
    made = generate(make_job({}))
    assert made.returncode == 1
    assert "state.sqlite" in made.stderr
    assert "Traceback" not in made.stderr
    assert state.read_bytes() == data


def test_two_runs_on_one_output(classes, make_job, tmp_path):
    from data_tools.pipeline import lock

    job = make_job({})
    with lock(tmp_path / "out"):
        made = generate(job)
    assert made.returncode == 1
    assert made.stderr.startswith("error: another run is writing to ")
    done(job)


def test_hostile_names_in_a_source(classes, make_job, tmp_path):
    draw(classes / "TUM" / "a#b%\n.png", 60)
    (classes / "TUM" / "out.png").symlink_to("/etc/hostname")
    (classes / "TUM" / "loop.png").symlink_to("loop.png")
    os.mkfifo(classes / "TUM" / "pipe.png")
    bad = os.fsencode(classes / "TUM") + b"/\xff.png"
    shutil.copy(classes / "TUM" / "image 0.png", bad)
    made = done(make_job({}))
    ids = [record["id"] for record in records(tmp_path / "out")]
    assert "2d#cls#microscopy#tissue#TUM#a%23b%25\n.png" in ids
    assert len(ids) == 7, made.stdout


@pytest.mark.slow
def test_ctrl_c_stops_and_the_same_command_goes_on(classes, make_job, tmp_path):
    for number in range(6, 100):
        draw(classes / "TUM" / f"image {number:03}.png", number)
    job = make_job({}, workers=2)
    process = subprocess.Popen(
        command(job), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(tmp_path / "out" / ".work" / "state.sqlite", process)
    time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "out" / "summary.json").exists()
    alone = make_job({}, name="alone.yaml")
    done(alone)
    done(alone, "--output", tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def wait_for(path: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.005)


def test_a_folder_that_holds_anything_else_is_left_alone(classes, make_job, tmp_path):
    job = make_job({})
    mine = tmp_path / "out" / "images" / "ab" / "scan.png"
    draw(mine, 99)
    before = files_of(tmp_path / "out")
    made = generate(job)
    assert made.returncode == 1
    (line,) = made.stderr.splitlines()
    assert line.startswith(f"error: the output folder {tmp_path / 'out'} is not empty (images)")
    assert files_of(tmp_path / "out") == before


@pytest.mark.parametrize("link", ["", "images", ".work"])
def test_a_foreign_state_makes_no_folder_ours_and_no_link_is_followed(
    link, classes, make_job, tmp_path, capsys
):
    job, out, mine = make_job({}), tmp_path / "out", tmp_path / "mine"
    draw(mine / "ab" / "scan.png", 99)
    out.mkdir()
    if link:
        assert main([str(job)]) == 0
        shutil.rmtree(out / link)
        (out / link).symlink_to(mine)
    else:
        shutil.copytree(mine, out / ".work")
    capsys.readouterr()
    before = files_of(tmp_path)
    assert main([str(job)]) == 1
    said = capsys.readouterr().err
    assert ("is a link" if link else "isn't an earlier run") in said
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), sqlite3.OperationalError("disk I/O error")]
)
def test_what_the_file_system_refuses_is_one_message(error, capsys):
    def run() -> int:
        raise error

    assert exit_status(run) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {error}. ")
    assert said.count("\n") == 1


def test_a_transaction_that_the_database_has_ended_tells_why(tmp_path):
    def fail(store: Store) -> None:
        with store.transaction():
            store._db.execute("ROLLBACK")
            raise ValueError("the cause")

    with Store(tmp_path / "state.sqlite") as store, pytest.raises(ValueError, match="the cause"):
        fail(store)


def test_a_source_says_for_itself_that_it_names_only_some(classes, make_job, tmp_path):
    make = {
        "caption": 0,
        "instruction": 0,
        "dialogue": 0,
        "text_single": 0,
        "text_multi": 0,
        "perception": 9,
    }
    other = {"name": "partial", "negatives": False, "root": str(tmp_path / "other")}
    for number in range(4):
        draw(tmp_path / "other" / ("NORM" if number % 2 else "TUM") / f"{number}.png", number + 50)
    done(make_job({}, other, make=make, corpus={"held_out": 0}))
    asked = {"tissue": set(), "partial": set()}
    for line in (tmp_path / "out" / "percept.jsonl").read_text().splitlines():
        name = json.loads(line)["id"]
        asked[name.split("#")[3]].add(name.rsplit("-", 1)[1])
    assert asked["tissue"] - asked["partial"] == {"yes_no", "multiple_choice"}
