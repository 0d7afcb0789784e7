# SPDX-License-Identifier: Apache-2.0

"""The ablation from its data to the paired test, by the real commands, too short to learn anything."""

import json
from pathlib import Path
from types import ModuleType

import pytest
from run import StepError

from gmai_xtuner.core.mixture import load_mixture
from tests.examples.forks import in_a_fork, load


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    return load("ablation")


def test_the_two_trainings_are_the_same_command(ablation: ModuleType, tmp_path: Path) -> None:
    both = ablation.Ablation(tmp_path, iterations=5)
    with_it, without = (both.train_command(name) for name in ("with", "without"))
    different = [pair for pair in zip(with_it, without, strict=True) if len(set(pair)) > 1]
    assert different == [(str(tmp_path / "with"), str(tmp_path / "without"))]
    assert "train_cfg.max_iters=5" in with_it


def test_a_folder_of_others_is_left_alone(ablation: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious.txt").write_text("mine")
    with pytest.raises(StepError, match="is not empty and not an ablation's"):
        ablation.Ablation(tmp_path).run()
    assert (tmp_path / "data" / "precious.txt").read_text() == "mine"


@pytest.mark.slow
def test_from_pictures_to_the_paired_test(
    ablation: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("GMAI_ALLOW_CPU", "1")  # bf16 is slow where the CPU has no such instructions
    monkeypatch.setattr(ablation.quickstart, "run_command", in_a_fork)
    monkeypatch.chdir(tmp_path)
    work = tmp_path / "work"
    sizes = ["--pictures", "16", "--public", "16", "--questions", "16", "--limit", "12"]
    status = ablation.main(["--work-dir", str(work), "--iterations", "20", *sizes])
    assert status == 0, capsys.readouterr().err[-4000:]

    mixtures = {name: load_mixture(work / "data" / f"{name}.yaml") for name in ("with", "without")}
    named = {name: [entry.name for entry in mixture.entries] for name, mixture in mixtures.items()}
    assert named == {
        "with": ["generated-caption", "generated-percept", "public"],
        "without": ["public"],
    }
    # The trainings themselves say what they have read; the public part was tokenised once for both.
    for name, text in {name: (work / f"{name}.log").read_text() for name in named}.items():
        assert all(f"  {dataset}: " in text for dataset in named[name])
        assert ("generated-" in text) == (name == "with")
    caches = [
        path.name.rpartition("-")[0]
        for path in (work / "cache" / "tokens").iterdir()
        if path.is_dir()
    ]
    assert sorted(caches) == ["generated-caption", "generated-percept", "public"]

    # No held-out picture is trained on.
    sources = json.loads((work / "data" / "benchmark" / "test.json").read_text())
    held_out = {Path(row["img_name"]).name for row in sources}
    assert len(sources) == 16
    assert held_out.isdisjoint(path.name for path in (work / "data" / "generated").rglob("*.png"))
    assert {row["answer"] for row in sources} == {"CT", "MR", "Fundus photography", "Pathology"}

    (comparison,) = json.loads((work / "comparison.json").read_text())
    assert (comparison["first"], comparison["second"]) == (
        "with the generated corpus", "without the generated corpus",
    )  # fmt: skip
    assert comparison["benchmark"] == "slake"
    # Models that have learnt this little do not end every answer; a cut one is compared with nothing.
    assert 1 <= comparison["n"] <= 12
    assert comparison["only_first"] + comparison["only_second"] <= comparison["n"]
    assert 0 < comparison["p_value"] <= 1
    assert f"of {comparison['n']} held-out questions, p = " in capsys.readouterr().out
