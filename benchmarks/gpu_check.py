# SPDX-License-Identifier: Apache-2.0

"""What must hold on a GPU before days are spent on one: ten groups of checks, under ten minutes on one card.

    make gpu-check                                       # on a CUDA device, else at a tiny size on the CPU
    python benchmarks/gpu_check.py --only steps zero     # some groups

Prints a line for each check, PASS, WARN, FAIL or SKIP with the figure and what was predicted, and writes
all of them to ``--out``. Each group is a process with a limit of time, so that one that dies fails alone.
Exit status 1 if a check failed. On the CPU the same code runs at a tiny size, to know that it works; what
only a GPU can show is skipped there.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SECONDS = {"steps": 280, "tests": 150, "command": 150}
"""Limits of time by group, in seconds; 90 for the others, and four times as long on the CPU."""
SHARE_OF_PEAK = 0.6
"""Of a card's dense bf16 peak that its matrix products reach; for the predicted seconds of a step."""


@dataclass(frozen=True)
class Check:
    """One line of the result; ``measured`` and ``wanted`` as a person reads them."""

    name: str
    verdict: str
    measured: str
    wanted: str = ""


def judged(name: str, holds: bool, measured: Any, wanted: str, *, otherwise: str = "FAIL") -> Check:
    return Check(name, "PASS" if holds else otherwise, str(measured), wanted)


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def only_on_gpu(name: str) -> Check:
    return Check(name, "SKIP", "needs a CUDA device")


def child(
    *arguments: str | Path, seconds: int, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run in the repository's root; the process that was too slow has exit status 124."""
    command = [sys.executable, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    try:
        return subprocess.run(
            command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"not done after {seconds} s")


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1][:300]


def environment() -> Iterator[Check]:
    """Driver, card, compiler and memory."""
    import psutil
    import torch

    for need, found in {
        "a C compiler, for DeepSpeed's and Triton's kernels": shutil.which("cc")
        or shutil.which("gcc"),
        "Python.h": next(Path(sysconfig.get_paths()["include"]).glob("Python.h"), None),
    }.items():
        yield judged(need, found is not None, found, "found", otherwise="WARN")
    gib = psutil.virtual_memory().total / 2**30
    yield judged("host memory", gib > 16, f"{gib:.0f} GiB", "over 16 GiB")
    shared = shutil.disk_usage("/dev/shm").total / 2**30 if Path("/dev/shm").is_dir() else 0.0
    yield judged(
        "/dev/shm, through which workers hand batches over",
        shared > 1,
        f"{shared:.1f} GiB",
        "over 1 GiB",
        otherwise="WARN",
    )
    if not on_gpu():
        made_for = torch.version.cuda or "no CUDA"
        yield Check(
            "device", "SKIP", f"no CUDA device; torch {torch.__version__} is made for {made_for}"
        )
        return
    card = torch.cuda.get_device_properties(0)
    yield judged(
        "compute capability",
        (card.major, card.minor) >= (8, 0),
        f"{card.name} {card.major}.{card.minor}",
        "8.0",
    )
    yield judged("bf16", torch.cuda.is_bf16_supported(), torch.version.cuda, "supported")
    yield Check("NCCL", "PASS", ".".join(map(str, torch.cuda.nccl.version())))


def tests() -> Iterator[Check]:
    """The tests marked gpu, and grouped heads against repeated ones."""
    import torch
    from torch.nn import functional

    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        done = child(
            "-m",
            "pytest",
            "-q",
            "-m",
            "gpu",
            f"--junitxml={report}",
            "tests",
            seconds=140 if on_gpu() else 560,
        )
        if not report.exists():
            yield Check(
                "tests marked gpu", "FAIL", last_line(done.stdout + done.stderr), "a report"
            )
        else:
            (suite,) = ElementTree.parse(report).getroot()
            number = {
                key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")
            }
            good = number["failures"] == number["errors"] == 0
            verdict = (
                "SKIP"
                if good and number["skipped"] == number["tests"]
                else "PASS"
                if good
                else "FAIL"
            )
            yield Check("tests marked gpu", verdict, str(number), "no failure")
    device, dtype = ("cuda", torch.bfloat16) if on_gpu() else ("cpu", torch.float32)
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 512, 128, device=device, dtype=dtype, requires_grad=True)
        for heads in (32, 8, 8)
    )

    def gradients(grouped: bool) -> list[torch.Tensor]:
        keys, values = (
            (key, value) if grouped else (one.repeat_interleave(4, dim=1) for one in (key, value))
        )
        out = functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, enable_gqa=grouped
        )
        return [out, *torch.autograd.grad(out.float().square().sum(), (query, key, value))]

    errors = [
        ((a.float() - b.float()).norm() / b.float().norm()).item()
        for a, b in zip(gradients(True), gradients(False), strict=True)
    ]
    bound = 0.02 if on_gpu() else 1e-5
    yield judged(
        "grouped heads 32/8, out and gradients",
        max(errors) < bound,
        f"{max(errors):.1e}",
        f"< {bound}",
    )


def geometry(layers: int) -> Any:
    """The 7B's width with a few layers; on the CPU the tiny one."""
    from train_step import GEOMETRIES

    return replace(GEOMETRIES["7b" if on_gpu() else "tiny"], layers=layers)


def build(stage: int, layers: int, *, liger: bool = False, shape: Any = None) -> Any:
    import torch
    from train_step import build_parts

    from gmai_xtuner.checkpoint.llava import GMAILLaVAModel

    device = torch.device("cuda" if on_gpu() else "cpu")
    dtype = torch.bfloat16
    llm, tower = build_parts(shape or geometry(layers), device, dtype, seed=0)
    torch.manual_seed(1)
    model = GMAILLaVAModel(
        llm, tower, freeze_llm=stage < 3, freeze_visual_encoder=stage < 2, liger=liger
    )
    return model.to(device, dtype)


def batches(
    number: int, micro_batch: int, max_length: int, vocabulary: int
) -> list[dict[str, Any]]:
    from random_batches import draw_conversations, fill_packs, our_batches

    packs_wanted = number * micro_batch
    drawn = draw_conversations(
        packs_wanted * 8, vocabulary=vocabulary, max_length=max_length, seed=0
    )
    # Packing may need fewer packs than asked for: one micro-batch more, and what is wanted of it.
    conversations, packs = fill_packs(drawn, packs_wanted + micro_batch, max_length)
    return our_batches(conversations, packs, micro_batch, max_length)[:number]


def moved(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    return {
        key: value.to(device) if hasattr(value, "to") else value
        for key, value in batch["data"].items()
    }


def kernel() -> Iterator[Check]:
    """The variable-length kernel against the loop: one layer of the true width, 16k tokens."""
    import torch

    if not on_gpu():
        yield only_on_gpu("varlen kernel against the loop")
        return
    model = build(3, 1)
    data = moved(batches(1, 8, 2048, 92544)[0], "cuda")
    results = {}
    for backend in ("varlen", "sdpa_loop"):
        model.llm.config.gmai_attention = backend
        model.zero_grad(set_to_none=True)
        loss = model(data)["loss"]
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.llm.model.layers.parameters()])
        results[backend] = (loss.item(), gradient.float())
    (ours, a), (loop, b) = results["varlen"], results["sdpa_loop"]
    yield judged("loss", abs(ours - loop) < 1e-3, f"{ours:.5f} and {loop:.5f}", "apart by < 1e-3")
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0).item()
    yield judged("cosine of the gradients", cosine > 0.999, f"{cosine:.6f}", "> 0.999")


def steps() -> Iterator[Check]:
    """Seconds and memory of three micro-batches of each stage against what preflight predicts."""
    import torch
    from train_step import MICRO_BATCHES, Side, set_recomputed_layers

    full = 32 if on_gpu() else 2
    liger_too = [False, True] if on_gpu() else [False]
    for stage in (1, 2, 3):
        length = 2048 if on_gpu() else 640
        data = batches(
            2, MICRO_BATCHES[stage] if on_gpu() else 1, length, geometry(full).vocabulary
        )
        for liger in liger_too:
            model = build(stage, full, liger=liger)
            # The optimiser's state of stage 3 fits no single card: there forward and backward alone.
            side = Side(model, optimise=stage < 3)
            for recomputed in (full, full // 2, 0):
                set_recomputed_layers(model, recomputed)
                name = f"stage {stage}, {recomputed} of {full} layers recomputed{', Liger' * liger}"
                try:
                    yield from measured_step(name, side, data, recomputed, liger)
                except torch.OutOfMemoryError as error:
                    model.zero_grad(set_to_none=True)
                    yield Check(name, "WARN", last_line(str(error)), "fits")
            del model, side
            gc.collect()
            torch.cuda.empty_cache()


def measured_step(name: str, side: Any, data: Any, recomputed: int, liger: bool) -> Iterator[Check]:
    import torch

    from gmai_xtuner.model.costs import ModelFlops, peak_flops

    device = next(side.model.parameters()).device
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = min(side.measure([data[0], data[0], *data], device))
    lengths = data[0]["data"]["lengths"]
    flops = ModelFlops.of(side.model)
    work = flops.flops(
        lengths,
        learnt_tokens=len(data[0]["data"]["label_targets"]),
        images=data[0]["data"]["pixel_values"].shape[0],
    )
    if not on_gpu():
        yield Check(name, "PASS", f"{seconds:.2f} s on the CPU")
        return
    allocated = torch.cuda.max_memory_allocated() / 2**30
    reserved = torch.cuda.max_memory_reserved() / 2**30
    predicted = predicted_gib(side, data[0]["data"], recomputed, liger)
    yield judged(
        f"{name}: memory",
        abs(allocated / predicted - 1) < 0.1,
        f"{allocated:.1f} GiB, reserved {reserved:.1f}",
        f"{predicted:.1f} GiB, 10 %",
    )
    peak = peak_flops(torch.cuda.get_device_name())
    if peak is None:
        yield Check(f"{name}: time", "WARN", f"{seconds:.2f} s; the peak of this card is not known")
        return
    layers = len(side.model.llm.model.layers)
    expected = work * (1 + recomputed / layers / 3) / (SHARE_OF_PEAK * peak)
    yield judged(
        f"{name}: time",
        seconds < 1.25 * expected,
        f"{seconds:.2f} s, MFU {work / seconds / peak:.2f}",
        f"{expected:.2f} s, 25 %",
        otherwise="WARN",
    )


def predicted_gib(side: Any, data: dict[str, Any], recomputed: int, liger: bool) -> float:
    """Weights, gradients and optimiser by their sizes, activations as preflight counts them."""
    import torch
    from train_step import set_recomputed_layers

    from gmai_xtuner.checkpoint.llava import GMAILLaVAModel
    from gmai_xtuner.model.liger import install_liger
    from gmai_xtuner.preflight.activations import MicroBatch, count_activations

    model = side.model
    with torch.device("meta"):
        twin = GMAILLaVAModel(
            type(model.llm)(model.llm.config),
            type(model.visual_encoder)(model.visual_encoder.config),
            freeze_llm=not next(model.llm.parameters()).requires_grad,
            freeze_visual_encoder=not next(model.visual_encoder.parameters()).requires_grad,
        )
    if liger:
        install_liger(twin.llm)
    set_recomputed_layers(twin, recomputed)
    lengths = data["lengths"]
    size = MicroBatch(
        len(lengths),
        sum(lengths) // len(lengths),
        len(data["label_targets"]),
        data["pixel_values"].shape[0],
        torch.bfloat16,
    )
    activations = count_activations(twin, size).total
    weights = sum(p.nbytes for p in model.parameters())
    learnt = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.nbytes for p in learnt)
    # Masters and both moments in fp32; the step's fp32 gradients come when the activations are gone.
    state = 12 * sum(p.numel() for p in learnt) if side.optimiser else 0
    return (weights + gradients + state + activations) / 2**30


COUNTER = '''
import json, os, traceback, warnings
import torch
from deepspeed.accelerator import get_accelerator
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.utils._python_dispatch import TorchDispatchMode


class Reads(TorchDispatchMode):
    """Counts where the host asks for a value of a tensor, which on a GPU is a wait."""

    def __init__(self):
        super().__init__()
        self.places = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.note()
        return function(*args, **(kwargs or {}))

    def note(self, *_):
        frames = traceback.extract_stack()
        if any("/torch/optim/" in f.filename for f in frames):
            return  # AdamW's number of steps lies on the host
        caller = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__][-1]
        self.places.append(f"{caller.filename.split('site-packages/')[-1]}:{caller.lineno}")


@HOOKS.register_module()
class HostWaitHook(Hook):
    """Looks at the third micro-batch and at the fourth, which ends the step, from before its data move to the
    device until its hooks are done."""

    priority = "LOWEST"

    def before_train(self, runner):
        self.found = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter in (2, 3):
            self.reads = Reads()
            type(get_accelerator()).synchronize = self.reads.note
            self.reads.__enter__()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter in (2, 3):
            self.reads.__exit__(None, None, None)
            self.found.append(self.reads.places)
            with open(os.environ["GMAI_HOST_WAITS"], "w") as file:
                json.dump(self.found, file)
'''


def command() -> Iterator[Check]:
    """Host waits in a micro-batch of the real ``xtuner train``, at a tiny size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mixture = tiny_corpus(folder)
        (folder / "host_waits.py").write_text(COUNTER)
        (folder / "config.py").write_text(
            f"_base_ = [{str(REPOSITORY / 'configs/gmai_vl/stage2_deep.py')!r}]\n"
            "custom_imports = dict(imports=['gmai_xtuner.plugin', 'host_waits'])\n"
            "custom_hooks = [dict(type='ProgressHook'), dict(type='HostWaitHook')]\n"
            # An answer and a line of the log are made of values on the host; here they are not asked for.
            "default_hooks = dict(sample_answer=dict(interval=1000), logger=dict(interval=1000))\n"
            "model = dict(pretrained_pth=None, pretrained_parts=None)\n"
            "train_dataloader = dict(batch_size=1, num_workers=0,\n"
            "    dataset=dict(max_length=200, held_out=0.0))\n"
        )
        out = folder / "waits.json"
        done = child(
            Path(sys.executable).with_name("xtuner"), "train", folder / "config.py", "--deepspeed", "zero2",
            "--work-dir", folder / "run",
            seconds=140 if on_gpu() else 560,
            PYTHONPATH=f"{REPOSITORY}{os.pathsep}{folder}",
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            GMAI_HOST_WAITS=str(out),
            GMAI_LLM=str(folder / "bases/llm"),
            GMAI_VISION=str(folder / "bases/vision"),
            GMAI_MIXTURE=str(mixture),
            GMAI_CACHE=str(folder / "cache"),
        )  # fmt: skip
        if not out.exists():
            yield Check(
                "xtuner train", "FAIL", last_line(done.stdout + done.stderr), "four micro-batches"
            )
            return
        places = json.loads(out.read_text())
        for what, found, most in zip(
            ("a micro-batch", "the end of a step"), places, (0, 2), strict=True
        ):
            yield judged(
                f"host waits of {what}",
                len(found) <= most,
                f"{len(found)}: {', '.join(found)}",
                f"{most} at most",
                otherwise="WARN",
            )


def tiny_corpus(folder: Path) -> Path:
    """Write tiny bases and 24 records of noise; return the mixture file."""
    from tests.toy import record, write_corpus

    done = child("-m", "gmai_xtuner.tiny_bases", folder / "bases", seconds=120)
    if done.returncode:
        raise RuntimeError(done.stderr)
    names = [f"{number}.png" for number in range(24)]
    question = "<image>\nWhich number? " + "Look closely. " * 5
    records = [record(name, question, f"It is number {name}.", image=name) for name in names]
    return write_corpus(folder / "corpus", {"noise": records}, images=names).mixture


def engine(name: str, model: Any, micro_batches: int = 1, **zero: Any) -> Any:
    """A DeepSpeed engine with AdamW under a file that ships, some keys of its ZeRO section changed."""
    import deepspeed
    import torch

    from gmai_xtuner.train.loop import rendezvous_alone

    rendezvous_alone()
    file = REPOSITORY / f"gmai_xtuner/train/deepspeed/{name}.json"
    config = json.loads(file.read_text())
    config.update(gradient_accumulation_steps=micro_batches, train_micro_batch_size_per_gpu=1)
    config["gradient_clipping"] = 1.0
    config["zero_optimization"].update(zero)
    learnt = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.0)
    return deepspeed.initialize(
        model=model, optimizer=optimizer, model_parameters=learnt, config=config
    )[0]


def trained(running: Any, data: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Loss and gradient norm of a step for each batch."""
    result = []
    for batch in data:
        loss = running(moved(batch, running.device))["loss"]
        running.backward(loss)
        running.step()
        result.append((loss.item(), float(running.get_global_grad_norm())))
    return result


def furthest(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> float:
    """The largest relative difference of any loss or norm."""
    return max(
        abs(a / b - 1) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "zero2": ("zero2", {}),
    "zero1": ("zero1", {}),
    "zero3": ("zero3", {}),
    "zero2 without overlap": ("zero2", {"overlap_comm": False}),
    "zero2 with buckets of 5e8": ("zero2", {"reduce_bucket_size": 500000000}),
}


def zero() -> Iterator[Check]:
    """Twenty steps of the true width by each kind of ZeRO give the same losses and norms."""
    import torch

    layers, number = (4, 20) if on_gpu() else (2, 2)
    shape = geometry(layers)
    data = batches(number, 1, 2048 if on_gpu() else 640, shape.vocabulary)
    first: list[tuple[float, float]] = []
    for name, (file, changed) in VARIANTS.items():
        running = engine(file, build(3, layers), **changed)
        result = trained(running, data)
        running.destroy()
        del running
        gc.collect()
        torch.cuda.empty_cache()
        first = first or result
        apart = furthest(result, first)
        yield judged(
            name, apart < 0.02, f"loss {result[-1][0]:.4f}, {apart:.1e} from zero2", "< 2e-2"
        )


def streams() -> Iterator[Check]:
    """Two steps with buckets smaller than the embedding, under torch's sanitizer of CUDA streams."""
    sanitizer = {"TORCH_CUDA_SANITIZER": "1"} if on_gpu() else {}
    done = child(__file__, "--sanitized", seconds=80 if on_gpu() else 320, **sanitizer)
    good = done.returncode == 0
    yield judged(
        "zero2 and zero3, bucket below the embedding",
        good,
        f"{last_line(done.stdout)}{'' if sanitizer else '; no streams on the CPU'}"
        if good
        else last_line(done.stderr),
        "nothing found",
    )


def sanitized() -> None:
    from train_step import GEOMETRIES

    import gmai_xtuner.plugin  # noqa: F401

    shape = replace(GEOMETRIES["tiny"], vocabulary=16384)
    data = batches(2, 1, 640, shape.vocabulary)
    losses = []
    for name in ("zero2", "zero3"):
        running = engine(name, build(3, shape.layers, shape=shape), reduce_bucket_size=100000)
        losses += [f"{loss:.4f}" for loss, _ in trained(running, data)]
        running.destroy()
    print("losses", *losses)


def checkpoints() -> Iterator[Check]:
    """Speed of writing, and that training goes on from a checkpoint as if it had not stopped."""
    import torch

    layers = 4 if on_gpu() else 2
    shape = geometry(layers)
    data = batches(4, 1, 2048 if on_gpu() else 640, shape.vocabulary)
    with tempfile.TemporaryDirectory() as folder:
        running = engine("zero2", build(3, layers))
        trained(running, data[:2])
        started = time.perf_counter()
        running.save_checkpoint(folder, tag="two")
        seconds = time.perf_counter() - started
        size = (
            sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()) / 2**30
        )
        going_on = trained(running, data[2:])
        running.destroy()
        del running
        gc.collect()
        torch.cuda.empty_cache()
        again = engine("zero2", build(3, layers))
        again.load_checkpoint(folder, tag="two")
        resumed = trained(again, data[2:])
        again.destroy()
    speed = size / max(seconds, 1e-9)
    yield judged(
        "writing",
        speed > 0.3,
        f"{size:.2f} GiB in {seconds:.1f} s, {speed:.2f} GiB/s",
        "0.3",
        otherwise="WARN",
    )
    apart = furthest(resumed, going_on)
    yield judged(
        "resumed", apart < (1e-3 if on_gpu() else 1e-6), f"{apart:.1e} from not stopped", "the same"
    )


def padded() -> Iterator[Check]:
    """Answers of a left-padded batch of four against each alone: the distribution of the first token."""
    import torch

    model = build(1, 4 if on_gpu() else 2).eval()
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.llm.config.vocab_size
    prompts = [torch.randint(1, vocabulary, (n,), generator=generator) for n in (5, 60, 33, 128)]
    longest = max(map(len, prompts))
    device = next(model.parameters()).device
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = (
            model.llm(input_ids=ids, attention_mask=mask, position_ids=positions)
            .logits[:, -1]
            .float()
        )
        alone = torch.stack(
            [model.llm(input_ids=p[None].to(device)).logits[0, -1].float() for p in prompts]
        )
    error = ((together - alone).norm(dim=1) / alone.norm(dim=1)).max().item()
    yield judged(
        "left-padded batch of four", error < 0.02, f"{error:.1e} relative", "< 2e-2, no NaN"
    )


def loader() -> Iterator[Check]:
    """Images a second that four workers read, against what a step takes."""
    import numpy as np
    from PIL import Image
    from torch.utils.data import DataLoader

    from gmai_xtuner.data.images import ImageTransform

    transform = ImageTransform(336, (0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
    with tempfile.TemporaryDirectory() as name:
        for side, wanted in ((1024, 20), (3464, 8)):
            folder = Path(name) / str(side)
            folder.mkdir()
            smooth = np.random.default_rng(0).integers(
                0, 256, (side // 8, side // 8, 3), dtype=np.uint8
            )
            buffer = io.BytesIO()
            Image.fromarray(smooth).resize((side, side), Image.Resampling.BICUBIC).save(
                buffer, "JPEG"
            )
            (folder / "one.jpg").write_bytes(buffer.getvalue())
            number = (320 if side == 1024 else 80) if on_gpu() else 8
            reading = Reading(transform, folder / "one.jpg", number)
            loaded = DataLoader(reading, batch_size=None, num_workers=4 if on_gpu() else 1)
            started = time.perf_counter()
            for _ in loaded:
                pass
            rate = number / (time.perf_counter() - started)
            yield judged(
                f"JPEG of {side} x {side}, {os.cpu_count()} cores",
                rate > wanted,
                f"{rate:.0f} images a second",
                f"{wanted} a GPU, or image_decoding='scaled'",
                otherwise="WARN",
            )


class Reading:
    """A data set of one file, read again and again."""

    def __init__(self, transform: Any, file: Path, number: int) -> None:
        self.transform, self.file, self.number = transform, file, number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Any:
        if index >= self.number:
            raise IndexError(index)
        return self.transform.read(self.file)


GROUPS: dict[str, Callable[[], Iterator[Check]]] = {
    one.__name__: one
    for one in (
        environment,
        tests,
        kernel,
        steps,
        command,
        zero,
        streams,
        checkpoints,
        padded,
        loader,
    )
}


def run_group(name: str) -> None:
    """Print the checks of a group, a JSON object a line, as they come; all else goes to stderr."""
    from printing import quiet_stdout

    with os.fdopen(os.dup(1), "w") as out, quiet_stdout():
        import gmai_xtuner.plugin  # noqa: F401  (repairs DeepSpeed)

        for check in GROUPS[name]():
            print(json.dumps(asdict(check)), file=out, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "work_dirs/gpu_check.json")
    parser.add_argument("--group", choices=GROUPS, help=argparse.SUPPRESS)
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    if options.sanitized:
        sanitized()
        return 0
    if options.group:
        run_group(options.group)
        return 0
    checks: list[dict[str, Any]] = []
    for name in options.only:
        started = time.perf_counter()
        limit = SECONDS.get(name, 90) * (1 if on_gpu() else 4)
        done = child(__file__, "--group", name, seconds=limit)
        found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode:
            found.append(asdict(Check("the group", "FAIL", last_line(done.stderr), "ends")))
        seconds = time.perf_counter() - started
        print(f"{name} ({seconds:.0f} s)")
        for one in found:
            wanted = f"   (wanted: {one['wanted']})" if one["wanted"] else ""
            print(f"  {one['verdict']:4} {one['name']}: {one['measured']}{wanted}", flush=True)
        checks += [{"group": name, **one} for one in found]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(checks, indent=1))
    return int(any(one["verdict"] == "FAIL" for one in checks))


if __name__ == "__main__":
    sys.exit(main())
