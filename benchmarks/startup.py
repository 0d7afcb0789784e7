# SPDX-License-Identifier: Apache-2.0

"""From a cached corpus to the first batch: time and memory of the main process and its workers.

Everything is measured in fresh processes. Importing torch, xtuner and this package is timed apart: it is
the same for any corpus. Files may be in the page cache of the system, as after the run that cached them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from printing import WORK_DIR, parser, peak_gib, quiet_stdout, show
from tokenizing import MAX_LENGTH, conversation, load_tokenizer

PICTURES = 64
WORKERS = 2


def write_corpus(folder: Path, samples: int, seed: int) -> None:
    """Records, a few images that they share, a mixture file, and the configs of the vision tower."""
    import random

    import numpy as np
    from PIL import Image

    if (folder / "mixture.yaml").is_file():
        return
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed)
    for number in range(PICTURES):
        pixels = noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        picture = Image.fromarray(pixels).resize((512, 512), Image.Resampling.BICUBIC)
        picture.save(folder / "images" / f"{number}.jpg", quality=90)
    with (folder / "records.jsonl").open("w", encoding="utf-8") as file:
        for number in range(samples):
            record = conversation(rng, number)
            if record["image"] is not None:
                record["image"] = f"{number % PICTURES}.jpg"
            file.write(json.dumps(record) + "\n")
    vision = folder / "vision"
    vision.mkdir(exist_ok=True)
    # The geometry of CLIP ViT-L/14-336; no weights are read here.
    geometry = {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"]}
    geometry |= {"image_size": 336, "patch_size": 14, "hidden_size": 1024, "num_hidden_layers": 24}
    geometry |= {"num_attention_heads": 16, "intermediate_size": 4096, "projection_dim": 768}
    (vision / "config.json").write_text(json.dumps(geometry))
    processor = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    processor |= {"image_mean": [0.48145466, 0.4578275, 0.40821073]}
    processor |= {"image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3}
    (vision / "preprocessor_config.json").write_text(json.dumps(processor))
    entry = {
        "annotations": "records.jsonl",
        "image_root": "images",
        "category": "Medical Instruction",
    }
    # JSON is YAML; the mixture is written last, when everything is there
    (folder / "mixture.yaml").write_text(json.dumps({"datasets": {"benchmark": entry}}))


def private_and_shared(pid: int) -> dict[str, float]:
    """GiB that only this process holds, and what it counts of shared pages."""
    found: dict[str, float] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, _, value = line.partition(":")
        found[key] = int(value.split()[0]) / 2**20
    private = found["Private_Clean"] + found["Private_Dirty"]
    return {"private_gib": private, "proportional_gib": found["Pss"], "resident_gib": found["Rss"]}


def open_ours(folder: Path, work_dir: Path) -> dict[str, Any]:
    """Build dataset, sampler and loader as a training run does, and take the first batch."""
    started = time.perf_counter()
    import torch  # noqa: F401
    from torch.utils.data import DataLoader

    from gmai_xtuner.data.dataset import SoftPackedDataset, collate_packs
    from gmai_xtuner.data.sampler import MicroBatchSampler, PackSampler

    tokenizer = load_tokenizer(None, work_dir)
    imported = time.perf_counter()
    before = peak_gib()
    dataset = SoftPackedDataset(
        str(folder / "mixture.yaml"),
        "stage1",
        tokenizer=tokenizer,
        vision=str(folder / "vision"),
        cache_dir=str(folder / "cache"),
        max_length=MAX_LENGTH,
        check_images="none",
        held_out=0.001,
    )
    sampler = MicroBatchSampler(PackSampler(dataset), 4, rank=0, world_size=1)
    loader = DataLoader(
        dataset, batch_sampler=sampler, num_workers=WORKERS, collate_fn=collate_packs
    )
    batches = iter(loader)
    next(batches)
    seconds = time.perf_counter() - imported
    workers = [private_and_shared(worker.pid) for worker in batches._workers]
    return {
        "import_seconds": imported - started,
        "seconds": seconds,
        "import_gib": before,
        "main_gib": peak_gib(),
        "worker_private_gib": max(worker["private_gib"] for worker in workers),
        "worker_proportional_gib": max(worker["proportional_gib"] for worker in workers),
        "worker_resident_gib": max(worker["resident_gib"] for worker in workers),
        "packs": len(dataset),
        "conversations": len(dataset.plan.samples),
    }


def open_xtuner(folder: Path, work_dir: Path, samples: int) -> dict[str, Any]:
    """xtuner's LLaVADataset on the first of the same records, and its first item."""
    from tokenizing import measure_xtuner

    part = folder / f"first-{samples}.jsonl"
    if not part.is_file():
        with (folder / "records.jsonl").open() as source, part.open("w") as file:
            for _, line in zip(range(samples), source, strict=False):
                file.write(line)
    import torch  # noqa: F401
    import xtuner.dataset  # noqa: F401

    seconds, dataset = measure_xtuner(part, load_tokenizer(None, work_dir), None)
    dataset.text_data[0]
    return {"xtuner_seconds": seconds, "xtuner_gib": peak_gib()}


def in_a_fresh_process(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--samples", type=int, default=1_000_000)
    options.add_argument("--peer-samples", type=int, default=20_000, help="of xtuner's")
    options.add_argument(
        "--without-plan",
        action="store_true",
        help="also the start that makes the plan of the epoch",
    )
    options.add_argument("--open", choices=("ours", "xtuner"), help="used by the benchmark itself")
    arguments = options.parse_args()
    work_dir: Path = arguments.work_dir or WORK_DIR
    folder = work_dir / f"startup-{arguments.samples}-{arguments.seed}"
    same = ["--work-dir", str(work_dir), "--samples", str(arguments.samples)]
    same += ["--seed", str(arguments.seed), "--peer-samples", str(arguments.peer_samples)]
    if arguments.open:
        with quiet_stdout():
            if arguments.open == "ours":
                result = open_ours(folder, work_dir)
            else:
                os.environ["HF_DATASETS_CACHE"] = str(folder / "hf")
                result = open_xtuner(folder, work_dir, arguments.peer_samples)
                shutil.rmtree(folder / "hf", ignore_errors=True)
        print(json.dumps(result))
        return
    with quiet_stdout():
        write_corpus(folder, arguments.samples, arguments.seed)
        if not (folder / "cache" / "tokens").is_dir():
            in_a_fresh_process("--open", "ours", *same)
        first = None
        if arguments.without_plan:
            shutil.rmtree(folder / "cache" / "plans", ignore_errors=True)
            first = in_a_fresh_process("--open", "ours", *same)
        again = in_a_fresh_process("--open", "ours", *same)
        peer = in_a_fresh_process("--open", "xtuner", *same)
        peer_samples = min(arguments.peer_samples, arguments.samples)
        scale = arguments.samples / peer_samples
        result = {
            "samples": arguments.samples,
            **again,
            "xtuner_samples": peer_samples,
            **peer,
            # Both grow with the number of records: it maps each row and holds all of them.
            "xtuner_seconds_scaled": peer["xtuner_seconds"] * scale,
        }
        if first is not None:
            result |= {
                "seconds_without_plan": first["seconds"],
                "main_gib_without_plan": first["main_gib"],
            }
    show(result, as_json=arguments.json)


if __name__ == "__main__":
    main()
