# SPDX-License-Identifier: Apache-2.0

"""The search for leaks: images hashed a second, hashes and questions searched, against the field's own.

Images are drawn as in images.py; imagehash makes its perceptual hash alone, ours both hashes by the rules
of training. Hashes are drawn at random, a part of them close to a query. Questions are made of clinical words
in templates. Seconds are of processor time, all threads together, so that a busy machine doesn't count.
Peers: imagehash 4.3 (images), FAISS (hashes: comparing all, and its multi-index), datasketch (MinHash LSH).
They are installed beside the environment; without a package index their figures are null.
"""

from __future__ import annotations

import importlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from images import draw
from printing import parser, peak_gib, quiet_stdout, show

PEERS = {
    "imagehash": ("ImageHash==4.3.2", "PyWavelets"),
    "faiss": ("faiss-cpu",),
    "datasketch": ("datasketch",),
}
KINDS = (("512x512 PNG", 512, 512, ".png", "RGB"), ("1024x1024 JPEG", 1024, 1024, ".jpg", "RGB"),
         ("1024x768 grey PNG", 1024, 768, ".png", "L"))  # fmt: skip
DISTANCE = 8


def find_peer(name: str, work_dir: Path) -> Any:
    """The module, installed without its dependencies into the work directory; None if that can't be."""
    folder = work_dir / "peers" / name
    if not (folder / name).is_dir():
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(folder),
        ]
        done = subprocess.run([*command, *PEERS[name]], stdout=sys.stderr, check=False)
        if done.returncode:
            print(
                f"{name} is not measured: {' '.join([*command, *PEERS[name]])} failed.",
                file=sys.stderr,
            )
            return None
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return importlib.import_module(name)


# --- images -----------------------------------------------------------------------------------


def write_pictures(folder: Path, count: int, seed: int) -> dict[str, list[Path]]:
    """So many of each kind, in a folder of their own."""
    rng = np.random.default_rng(seed)
    files: dict[str, list[Path]] = {}
    for number, (kind, width, height, suffix, mode) in enumerate(KINDS):
        for index in range(count):
            path = folder / f"{number}-{index}{suffix}"
            draw(width, height, mode, rng).save(path)
            files.setdefault(kind, []).append(path)
    return files


def measure_pictures(folder: Path, count: int, seed: int, imagehash: Any) -> dict[str, Any]:
    from PIL import Image

    from data_tools.contamination.hashing import ImageSource, hash_image, open_cache
    from data_tools.executor import cores, open_executor

    files = write_pictures(folder, count, seed)
    rows = []
    for kind, paths in files.items():
        ours, theirs = [], []
        for _ in range(3):
            begun = time.process_time()
            for path in paths:
                hash_image(path)
            ours.append(time.process_time() - begun)
            if imagehash is None:
                continue
            begun = time.process_time()
            for path in paths:
                with Image.open(path) as image:
                    imagehash.phash(image)
            theirs.append(time.process_time() - begun)
        rows.append(
            {
                "kind": kind,
                "ours_per_second": len(paths) / min(ours),
                "imagehash_per_second": len(paths) / min(theirs) if theirs else None,
            }
        )
    everything = [path for paths in files.values() for path in paths]
    pictures = [ImageSource(number, path) for number, path in enumerate(everything)]
    seconds = []
    with open_cache(folder / "hashes.sqlite") as cache, open_executor("processes") as engine:
        list(engine.map(len, ["", ""] * engine.workers))  # started before it is timed
        for _ in range(2):
            begun = time.perf_counter()
            assert len(list(cache.hashes(pictures, engine))) == len(pictures)
            seconds.append(time.perf_counter() - begun)
    return {
        "pictures": rows,
        "all_cores": cores(),
        "all_cores_per_second": len(pictures) / seconds[0],
        "from_cache_per_second": len(pictures) / seconds[1],
    }


# --- hashes -------------------------------------------------------------------------------------


def draw_hashes(values: int, queries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint64 ``[values]`` and ``[queries]``; a thousandth of the values is 0 to 8 bits from a query."""
    rng = np.random.default_rng(seed)
    asked = rng.integers(0, 2**64, queries, dtype=np.uint64)
    there = rng.integers(0, 2**64, values, dtype=np.uint64)
    planted = max(1, values // 1000)
    near = asked[rng.integers(0, queries, planted)]
    for _ in range(DISTANCE):
        near = near ^ (
            rng.integers(0, 2, planted, dtype=np.uint64)
            << rng.integers(0, 64, planted).astype(np.uint64)
        )
    there[:planted] = near
    return there, asked


def measure_search(values: int, queries: int, brute: int, seed: int, faiss: Any) -> dict[str, Any]:
    from gmai_xtuner.core.hamming import cheapest, search

    there, asked = draw_hashes(values, queries, seed)

    def ours(some: np.ndarray, **options: Any) -> tuple[float, set[tuple[int, int]]]:
        begun = time.process_time()
        found = [
            pair
            for part in search(some, there, distance=DISTANCE, **options)
            for pair in zip(part.query.tolist(), part.value.tolist(), strict=True)
        ]
        return time.process_time() - begun, set(found)

    seconds, found = ours(asked)
    part = asked[:brute]
    brute_seconds, expected = ours(part, pieces=0)
    result: dict[str, Any] = {
        "values": values,
        "queries": queries,
        "distance": DISTANCE,
        "pieces": cheapest(queries, values, DISTANCE),
        "search_seconds": seconds,
        "pairs": len(found),
        "brute_queries": len(part),
        "brute_seconds": brute_seconds * queries / len(part),
        "same_as_brute": {pair for pair in found if pair[0] < len(part)} == expected,
        "faiss_flat_seconds": None,
        "faiss_multihash_seconds": None,
        "same_as_faiss": None,
    }
    if faiss is not None:
        as_bytes, some = there.view(np.uint8).reshape(-1, 8), part.view(np.uint8).reshape(-1, 8)
        flat = faiss.IndexBinaryFlat(64)
        flat.add(as_bytes)
        begun = time.process_time()
        limits, _, labels = flat.range_search(some, DISTANCE + 1)
        result["faiss_flat_seconds"] = (time.process_time() - begun) * queries / len(part)
        left = np.repeat(np.arange(len(part)), np.diff(limits.astype(np.int64)))
        told = set(zip(left.tolist(), labels.tolist(), strict=True))
        result["same_as_faiss"] = {pair for pair in found if pair[0] < len(part)} == told
        begun = time.process_time()
        index = faiss.IndexBinaryMultiHash(64, 3, 21)
        index.nflip = DISTANCE // 3
        index.add(as_bytes)
        index.range_search(some, DISTANCE + 1)
        result["faiss_multihash_seconds"] = (time.process_time() - begun) * queries / len(part)
    return result


# --- questions ----------------------------------------------------------------------------------

PARTS = (
    ("is there", "can you see", "do you find", "what is", "where is", "how large is", "which side shows"),
    ("a", "the", "any", "an obvious", "a small", "a large"),
    ("pleural", "hepatic", "renal", "cerebral", "pulmonary", "gastric", "cardiac", "retinal", "dermal"),
    ("effusion", "lesion", "mass", "cyst", "nodule", "haemorrhage", "fracture", "opacity", "calcification"),
    ("in the", "near the", "above the", "below the", "next to the"),
    ("left", "right", "upper", "lower", "middle", "posterior", "anterior"),
    ("lobe", "pole", "segment", "quadrant", "zone", "region", "field"),
    ("of this image", "of this slice", "on this film", "in this view", "of the patient", "shown here"),
)  # fmt: skip


def draw_questions(count: int, seed: int) -> list[str]:
    """So many different normalised questions."""
    dice = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(dice.choice(part) for part in PARTS)] = None
    return list(found)


def measure_questions(known: int, asked: int, seed: int, datasketch: Any) -> dict[str, Any]:
    from data_tools.contamination.questions import TextIndex, grams

    texts, queries = draw_questions(known, seed), draw_questions(asked, seed + 1)
    begun = time.process_time()
    index = TextIndex(texts, threshold=0.5)
    built = time.process_time() - begun
    begun = time.process_time()
    found = {(q, number) for q, text in enumerate(queries) for number, _ in index.near(text)}
    seconds = time.process_time() - begun
    result: dict[str, Any] = {
        "benchmark_questions": known,
        "corpus_questions": asked,
        "index_seconds": built,
        "questions_per_second": asked / seconds,
        "near_pairs": len(found),
        "datasketch_per_second": None,
        "datasketch_recall": None,
        "datasketch_false": None,
    }
    if datasketch is not None:

        def sketch(text: str) -> Any:
            made = datasketch.MinHash(num_perm=128, seed=1)
            made.update_batch([gram.encode() for gram in grams(text)])
            return made

        index_of = datasketch.MinHashLSH(threshold=0.5, num_perm=128)
        for number, text in enumerate(texts):
            index_of.insert(number, sketch(text))
        begun = time.process_time()
        told = {
            (q, number) for q, text in enumerate(queries) for number in index_of.query(sketch(text))
        }
        result["datasketch_per_second"] = asked / (time.process_time() - begun)
        result["datasketch_recall"] = len(told & found) / len(found) if found else None
        result["datasketch_false"] = len(told - found)
    return result


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--pictures", type=int, default=40, help="of each kind")
    options.add_argument("--values", type=int, default=1_000_000, help="hashes of the corpus")
    options.add_argument("--queries", type=int, default=100_000, help="hashes of the benchmark")
    options.add_argument(
        "--brute-queries", type=int, default=2_000, help="of them compared with all"
    )
    options.add_argument("--questions", type=int, default=20_000, help="of the benchmark")
    options.add_argument("--asked", type=int, default=5_000, help="questions of the corpus")
    chosen = options.parse_args()
    with quiet_stdout():
        peers = {name: find_peer(name, chosen.work_dir) for name in PEERS}
        if peers["faiss"] is not None:
            peers["faiss"].omp_set_num_threads(len(os.sched_getaffinity(0)))
        result = measure_search(
            chosen.values, chosen.queries, chosen.brute_queries, chosen.seed, peers["faiss"]
        )
        result["peak_gib"] = peak_gib()
        result |= measure_questions(
            chosen.questions, chosen.asked, chosen.seed, peers["datasketch"]
        )
        with tempfile.TemporaryDirectory() as folder:
            result |= measure_pictures(
                Path(folder), chosen.pictures, chosen.seed, peers["imagehash"]
            )
    show(result, as_json=chosen.json)


if __name__ == "__main__":
    main()
