# SPDX-License-Identifier: Apache-2.0

"""The 7B at its true size, with random weights, on the CPU: what a release does, and the memory it takes.

    python examples/rehearsal/run.py --work-dir work_dirs/rehearsal               # 40 GB of disk, 24 GiB
    python examples/rehearsal/run.py --work-dir work_dirs/rehearsal_2 --layers 2  # the same code, minutes

The geometry is InternLM2.5-7B's and CLIP ViT-L/14-336's, in their own layouts. The real commands follow each
other: preflight (which tokenises), one optimiser step of stage 1 and of stage 2 by ``xtuner train``, both
exports by ``xtuner convert``, and one greedy answer of the plain export by transformers alone. A step that is
done is not done again; when all are, the weights are removed. Every step's seconds and memory go to
``report.json`` and ``report.md``: ``private`` memory can't be taken away from a process, ``resident`` counts
mapped files as well, whose pages the system drops when memory is short.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "quickstart"), str(HERE.parent)]

import psutil  # noqa: E402
import run as quickstart  # noqa: E402

GIB = 2**30
MOST_GIB = 20.0
"""No step may need more private memory."""
SHARD_GB = 2.0
"""Size of a file of the export; `xtuner convert`'s default."""
QUESTION = "What is shown?"
SETTINGS = {
    "model.use_activation_checkpointing": True,
    "train_dataloader.batch_size": 1,
    "train_dataloader.num_workers": 1,
    "train_dataloader.dataset.max_length": 640,
    "train_dataloader.dataset.held_out": 0,
    "optim_wrapper.accumulative_counts": 1,
    "default_hooks.sample_answer.interval": 1000,
    "default_hooks.logger.interval": 1,
}
CONFIGS = {"stage1": "stage1_shallow", "stage2": "stage2_deep"}
ANSWER = """
import sys, torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
folder, image, question = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder)
model = LlavaForConditionalGeneration.from_pretrained(folder, torch_dtype="auto", low_cpu_mem_usage=True)
said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
text = processor.apply_chat_template(said, add_generation_prompt=True)
inputs = processor(images=Image.open(image), text=text, return_tensors="pt").to(model.dtype)
with torch.inference_mode():
    ids = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
new = ids[0, inputs["input_ids"].shape[1]:].tolist()
print("ANSWER", new)
"""


def memory_of_tree(process: psutil.Process) -> tuple[int, int]:
    """Return private and resident bytes of a process and its children; what they share counts once."""
    private = resident = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            text = Path(f"/proc/{one.pid}/smaps_rollup").read_text(encoding="utf-8")
        except OSError:  # it has ended
            continue
        fields = (line.split() for line in text.splitlines()[1:])
        sizes = {words[0]: int(words[1]) * 1024 for words in fields}
        private += sizes["Pss_Anon:"] + sizes["Pss_Shmem:"]
        resident += sizes["Pss:"]
    return private, resident


def measured(work: Callable[[], Any]) -> dict[str, float]:
    """Call; return the seconds, and the highest memory of this process's children, in GiB."""
    peak, over = [0, 0], threading.Event()

    def watch() -> None:
        pause = 0.1  # longer and longer: it costs a second to look at the 7B's pages
        while not over.wait(pause):
            pause = min(2 * pause, 2)
            for child in psutil.Process().children():
                seen = memory_of_tree(child)
                peak[:] = [max(pair) for pair in zip(peak, seen, strict=True)]

    watcher = threading.Thread(target=watch, daemon=True)
    begun = time.monotonic()
    watcher.start()
    try:
        work()
    finally:
        over.set()
        watcher.join()
    seconds = time.monotonic() - begun
    return {
        "seconds": round(seconds, 1),
        "private_gib": round(peak[0] / GIB, 2),
        "resident_gib": round(peak[1] / GIB, 2),
    }


def write_bases(folder: Path, *, layers: int, tiny: bool, siglip: bool) -> None:
    """Write both bases, one file of weights in memory at a time."""
    import tiny_bases

    llm, vision = tiny_bases.TinyLLM(torch_dtype="bfloat16"), tiny_bases.TinyVision(siglip=siglip)
    if not tiny:
        llm = replace(
            llm, vocab_size=92544, unused_ids=92544 - 1536, hidden_size=4096, intermediate_size=14336,
            num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8, shards=min(8, layers),
        )  # fmt: skip
        vision = replace(
            vision, patch_size=14, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24,
            num_attention_heads=16,
        )  # fmt: skip
    tiny_bases.write_tiny_bases(folder, llm=llm, vision=vision)


def write_corpus(folder: Path) -> None:
    """Write one conversation about one image, so that an epoch is one optimiser step."""
    from PIL import Image

    (folder / "images").mkdir(parents=True, exist_ok=True)
    Image.linear_gradient("L").convert("RGB").save(folder / "images" / "one.png")
    said = [("human", f"<image>\n{QUESTION}"), ("gpt", "A chest radiograph.")]
    turns = [{"from": who, "value": text} for who, text in said]
    record = {"id": "one", "image": "one.png", "conversations": turns}
    (folder / "train.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (folder / "mixture.yaml").write_text(
        "datasets:\n  one:\n    annotations: train.jsonl\n    image_root: images\n"
        "    category: Medical Instruction\n    ratio: {stage1: 1.0, stage2: 1.0, stage3: 1.0}\n",
        encoding="utf-8",
    )


def steps_of(work_dir: Path, options: argparse.Namespace) -> list[tuple[str, list[str], Path]]:
    """Return each step's name, its command and a file that is there when it is done."""
    settings = [f"{key}={value}" for key, value in SETTINGS.items()]
    config = {stage: f"configs/gmai_vl/{name}.py" for stage, name in CONFIGS.items()}

    def preflight(stage: str) -> tuple[str, list[str], Path]:
        command = [
            "python",
            "-m",
            "gmai_xtuner.preflight",
            config[stage],
            "--cfg-options",
            *settings,
        ]
        return f"preflight of {stage}", command, work_dir / f"preflight_{stage}.done"

    def train(stage: str) -> tuple[str, list[str], Path]:
        folder = work_dir / stage
        command = [
            "xtuner",
            "train",
            config[stage],
            "--work-dir",
            str(folder),
            "--deepspeed",
            "zero2",
        ]
        return stage, [*command, "--cfg-options", *settings], folder / "last_checkpoint"

    def convert(kind: str, *more: str) -> tuple[str, list[str], Path]:
        folder = work_dir / kind
        command = [
            "xtuner",
            "convert",
            "pth_to_hf",
            config["stage2"],
            str(work_dir / "stage2"),
            str(folder),
        ]
        return (
            f"export as {kind}",
            [*command, "--save-format", kind, *more],
            folder / "gmai_vl.json",
        )

    me = [
        "python",
        str(Path(__file__)),
        "--work-dir",
        str(work_dir),
        "--layers",
        str(options.layers),
    ]
    bases = [
        *me,
        "--only-bases",
        *(f"--{name}" for name in ("tiny", "siglip") if getattr(options, name)),
    ]
    image = str(work_dir / "corpus" / "images" / "one.png")
    answer = ["python", "-c", ANSWER, str(work_dir / "huggingface"), image, QUESTION]
    return [
        ("bases", bases, work_dir / "bases" / "vision" / "config.json"),
        preflight("stage1"),
        train("stage1"),
        preflight("stage2"),
        train("stage2"),
        convert("xtuner", "--safe-serialization"),
        convert("huggingface"),
        ("answer by transformers", answer, work_dir / "answer.done"),
    ]


def run_step(
    name: str, command: Sequence[str], proof: Path, environment: Mapping[str, str]
) -> None:
    """Run a command; a file ``.done`` is written, any other proof must be there.

    Raises:
        StepError: it ended with an error, or without what it should have written.
    """
    log = Path(environment["GMAI_CACHE"]).parent / f"{name.replace(' ', '_')}.log"
    try:
        quickstart.run_command(command, log, environment=environment)
        if proof.suffix == ".done":
            proof.touch()
        elif not proof.is_file():
            raise quickstart.StepError(f"left no {proof}")
    except quickstart.StepError as error:
        raise quickstart.StepError(f"{name}: {error}{quickstart.log_tail(log)}") from error


def bounds(work_dir: Path, figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return what a step took too much of."""
    wrong = [
        f"{name} needed {one['private_gib']} GiB, and no step may need more than {MOST_GIB}"
        for name, one in figures.items()
        if one["private_gib"] > MOST_GIB
    ]
    export = work_dir / "huggingface"
    if "export as huggingface" in figures and export.is_dir():
        model = sum(file.stat().st_size for file in export.glob("*.safetensors"))
        most = (model + 1.3 * SHARD_GB * 1e9) / GIB
        took = figures["export as huggingface"]["private_gib"]
        if took > most + 1:  # the interpreter and its libraries
            wrong.append(
                f"the plain export needed {took} GiB, more than model and 1.3 files, {most:.1f}"
            )
    return wrong


def write_report(work_dir: Path, figures: Mapping[str, Mapping[str, float]]) -> str:
    """Write ``report.json`` and ``report.md``; return the table."""
    (work_dir / "report.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    lines = ["| step | seconds | private, GiB | resident, GiB |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {one['seconds']:.0f} | {one['private_gib']:.2f} | {one['resident_gib']:.2f} |"
        for name, one in figures.items()
    ]
    total = sum(one["seconds"] for one in figures.values())
    table = "\n".join([*lines, f"| all | {total:.0f} | | |"]) + "\n"
    (work_dir / "report.md").write_text(table, encoding="utf-8")
    return table


def rehearse(work_dir: Path, options: argparse.Namespace) -> list[str]:
    """Run what has not been done yet; return what a step took too much of.

    Raises:
        StepError: a step did not end as it should have.
    """
    quickstart.claim(work_dir)
    write_corpus(work_dir / "corpus")
    environment = quickstart.child_environment(work_dir)
    environment |= {"GMAI_ALLOW_CPU": "1", "GMAI_STAGE1": str(work_dir / "stage1")}
    # xtuner counts the ranks that it is to start by this; one has all cores.
    environment.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    record = work_dir / "report.json"
    figures = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    steps = steps_of(work_dir, options)
    done = {name for name, _, proof in steps if name in figures and proof.exists()}
    for name, command, proof in steps:
        if name in done or len(figures) == len(steps):
            continue
        if proof.parent != work_dir and proof.parent.exists() and name != "bases":
            shutil.rmtree(proof.parent)  # of a step that was stopped
        figures[name] = measured(partial(run_step, name, command, proof, environment))
        write_report(work_dir, figures)
        print(f"  {name}: {figures[name]}", flush=True)
    print("\n" + write_report(work_dir, figures), flush=True)
    # With fewer layers what a checkpoint takes to be read outweighs the model.
    wrong = bounds(work_dir, figures) if options.layers == 32 else []
    for folder in ("bases", "stage1", "stage2", "xtuner", "huggingface"):
        shutil.rmtree(work_dir / folder, ignore_errors=True)
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The 7B at its true size on the CPU.")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/rehearsal"))
    parser.add_argument("--layers", type=int, default=32, help="of the language model (default 32)")
    parser.add_argument(
        "--tiny", action="store_true", help="the tiny bases' width, to test this script"
    )
    parser.add_argument("--siglip", action="store_true", help="a tower in SigLIP's layout")
    parser.add_argument("--only-bases", action="store_true", help="write the bases and end")
    options = parser.parse_args(arguments)
    work_dir = options.work_dir.resolve()
    os.chdir(quickstart.ROOT)
    if options.only_bases:
        write_bases(
            work_dir / "bases", layers=options.layers, tiny=options.tiny, siglip=options.siglip
        )
        return 0
    try:
        wrong = rehearse(work_dir, options)
    except quickstart.StepError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    for problem in wrong:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
