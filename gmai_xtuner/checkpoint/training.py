# SPDX-License-Identifier: Apache-2.0

"""Which checkpoints of a work dir are whole, and which of them is the newest.

A work dir holds DeepSpeed folders ``iter_<N>.pth`` (or ``epoch_<N>.pth``, or a single file of that name).
One that :class:`~gmai_xtuner.train.checkpointing.StepCheckpointHook` wrote has a ``manifest.json``, made
when everything else was on disk. One written by xtuner alone has none; it is judged by its files.

A later stage loads their weights part by part, strictly.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from gmai_xtuner.checkpoint.weights import install_safe_reader, read_training_state
from gmai_xtuner.core.errors import ModelLoadError
from gmai_xtuner.core.hub import shorten
from gmai_xtuner.core.strict_json import STRICT_JSON
from gmai_xtuner.data.log import warn

MANIFEST = "manifest.json"
POINTER = "last_checkpoint"
STAGE = "gmai_stage"
"""Where a checkpoint's message hub keeps the name of the stage that was trained."""

_NUMBERED = re.compile(r"(?:iter|epoch)_(\d+)\.pth")
_OPTIMIZER_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_optim_states\.pt$")
_WEIGHTS_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_\d+_model_states\.pt$")
_RANK_FILE = re.compile(r"^rank_(\d+)\.pt$")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint folder holds.

    Args:
        iteration: micro-batches trained.
        sequence: how many checkpoints the work dir had been given before, plus one. Iterations repeat
            when a run goes back to an earlier checkpoint; this number never does.
        world_size: ranks, each with its own shard of the optimiser.
        seed: seed of the run.
        files: name -> size in bytes of every other file.
    """

    iteration: int
    sequence: int
    world_size: int
    seed: int | None
    files: Mapping[str, int]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)


def read_manifest(checkpoint: Path) -> Manifest | None:
    """The manifest of a checkpoint; ``None`` where there is none.

    Raises:
        ValueError: if there is one that can't be read.
    """
    try:
        text = (checkpoint / MANIFEST).read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return Manifest(**STRICT_JSON.decode(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"its {MANIFEST} can't be read ({error})") from error


def what_is_wrong(checkpoint: Path) -> str | None:
    """Why a checkpoint can't be used, in words that go after its name; ``None`` if it is whole.

    Looks at names and sizes, and at the end of files that no manifest vouches for; reads no weights.
    """
    if checkpoint.is_file():
        return None if checkpoint.stat().st_size else "is an empty file"
    if not checkpoint.is_dir():
        return "is not there"
    try:
        manifest = read_manifest(checkpoint)
    except ValueError as error:
        return f"is damaged: {error}"
    if manifest is not None:
        for name, size in manifest.files.items():
            file = checkpoint / name
            if not file.is_file():
                return f"is incomplete: {name} is not there"
            if file.stat().st_size != size:
                return f"is damaged: {name} has {file.stat().st_size} bytes, not {size}"
        return None
    states = sorted(checkpoint.glob("*_states.pt"))
    if not any(file.name.endswith("_model_states.pt") for file in states):
        return "is incomplete: it has no *_model_states.pt"
    ranks = _ranks(_OPTIMIZER_SHARD, [file.name for file in states])
    if ranks != list(range(len(ranks))):
        return f"is incomplete: it has the optimiser's shards of ranks {ranks} only"
    for file in states:
        # torch.save writes a zip file, whose directory comes last.
        if not zipfile.is_zipfile(file):
            return f"is damaged: {file.name} is cut off"
    return None


def _ranks(pattern: re.Pattern[str], names: Iterable[str]) -> list[int]:
    return sorted(int(match[1]) for name in names if (match := pattern.search(name)))


def files_of_ranks_that_are_wrong(names: Collection[str], world_size: int) -> str | None:
    """Say what is wrong with the files that every rank writes, in words that go after the folder's name.

    Each of ``world_size`` ranks writes ``rank_<r>.pt``, under ZeRO (all stages, offloaded or not, and bf16
    without ZeRO) its shard of the optimiser, and under ZeRO-3 its shard of the weights. ``None`` if each has
    one file of every kind that is there at all, and no other rank has.
    """
    if not any(name.endswith("_model_states.pt") for name in names):
        return "is incomplete: it has no *_model_states.pt"
    kinds = (
        ("random states (rank_*.pt)", _RANK_FILE, True),
        ("the optimiser's shards (*_optim_states.pt)", _OPTIMIZER_SHARD, False),
        ("the weights' shards (zero_pp_rank_*_model_states.pt)", _WEIGHTS_SHARD, False),
    )
    for what, pattern, always in kinds:
        ranks = _ranks(pattern, names)
        if ranks != list(range(world_size)) and (ranks or always):
            return (
                f"is incomplete: it has {what} of ranks {ranks}, not of the {world_size} that wrote"
            )
    return None


def iteration_of(checkpoint: Path) -> int | None:
    """``8`` for ``iter_8.pth``; ``None`` for what is not named like a checkpoint."""
    match = _NUMBERED.fullmatch(checkpoint.name)
    return int(match[1]) if match else None


def checkpoints_in(work_dir: Path) -> list[Path]:
    """Everything in a work dir that is named like a checkpoint, the newest first.

    The newest is the one written last (:attr:`Manifest.sequence`). Among those without manifest it is the
    one that ``last_checkpoint`` names, then the one of the highest iteration.
    """
    if not work_dir.is_dir():
        return []
    pointer = work_dir / POINTER
    # The work dir may have been moved since: the name counts, not the path.
    pointed = Path(pointer.read_text().strip()).name if pointer.is_file() else None

    def age(checkpoint: Path) -> tuple[int, bool, int]:
        return sequence_of(checkpoint), checkpoint.name == pointed, iteration_of(checkpoint) or 0

    found = (child for child in work_dir.iterdir() if iteration_of(child) is not None)
    return sorted(found, key=age, reverse=True)


def sequence_of(checkpoint: Path) -> int:
    """:attr:`Manifest.sequence`; 0 without a readable manifest."""
    try:
        manifest = read_manifest(checkpoint)
    except ValueError:
        return 0
    return manifest.sequence if manifest else 0


def newest_whole(work_dir: Path) -> tuple[Path | None, dict[str, str]]:
    """Return the newest whole checkpoint of a work dir, if any, and what is wrong with others, by name.

    The others are newer, or of a higher iteration, and passed over.
    """
    found: Path | None = None
    passed_over: dict[str, str] = {}
    for checkpoint in checkpoints_in(work_dir):
        if found is not None and (iteration_of(checkpoint) or 0) < (iteration_of(found) or 0):
            continue
        if wrong := what_is_wrong(checkpoint):
            passed_over[checkpoint.name] = wrong
        else:
            found = found or checkpoint
    return found, passed_over


def resolve_checkpoint(path: str | Path) -> Path:
    """Return the ``.pth`` file or DeepSpeed directory that ``path`` names, or a work dir's newest whole one.

    Broken ones that are newer are named in a warning.

    Raises:
        ModelLoadError: if there is none, or the one that was named is not whole; says what is wrong.
    """
    path = Path(path)
    if path.is_file() or iteration_of(path) is not None or first_rank_file(path):
        if wrong := what_is_wrong(path):
            raise ModelLoadError(f"checkpoint {str(path)!r} {wrong}. Take another one")
        return path
    if not path.is_dir():
        raise ModelLoadError(
            f"there is no checkpoint or work dir {str(path)!r}. Name a work dir, or an iter_N.pth in it: to "
            "convert, as the command's CHECKPOINT; to train, as GMAI_STAGE1 (stage 2) or GMAI_STAGE2 "
            "(stage 3), once the stage before is trained"
        )
    newest, passed_over = newest_whole(path)
    for name, wrong in passed_over.items():
        warn(f"{path / name} {wrong}; passed over")
    if newest is None:
        broken = f" that is whole: {', '.join(passed_over)} can't be used" if passed_over else ""
        raise ModelLoadError(
            f"work dir {str(path)!r} has no checkpoint (no iter_N.pth){broken}. Did that stage finish?"
        )
    return newest


def first_rank_file(checkpoint: Path) -> Path | None:
    """Return the file of the first rank in a DeepSpeed directory, which has what all ranks share."""
    return min(checkpoint.glob("*_model_states.pt"), default=None)


def check_stage(checkpoint: Path, stage: str) -> None:
    """Raise ``ModelLoadError`` if a checkpoint says that another stage wrote it than that of the config."""
    file = first_rank_file(checkpoint)
    state = read_training_state(file, mmap=True) if file else {}
    learnt = (state.get("message_hub") or {}).get("runtime_info", {}).get(STAGE, stage)
    if learnt != stage:
        raise ModelLoadError(
            f"{checkpoint} was trained as {learnt}, and the config is one of {stage}: the export would say "
            "what is not so. Use the config of the stage that made the checkpoint"
        )


def load_checkpoint_state(path: str | Path) -> dict[str, torch.Tensor]:
    """State dict of a checkpoint: a ``.pth`` file or a DeepSpeed directory of any ZeRO stage."""
    from xtuner.model.utils import guess_load_checkpoint

    install_safe_reader()
    checkpoint = resolve_checkpoint(path)
    state = dict(guess_load_checkpoint(str(checkpoint)))
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ModelLoadError(f"{str(checkpoint)!r} holds no model weights")
    return state


def load_parts(
    model: nn.Module, state: Mapping[str, torch.Tensor], *, required: Iterable[str], source: str
) -> list[str]:
    """Load whole parts (``llm``, ``visual_encoder``, ``projector``) of a model, strictly.

    A stage saves only what it trained, so a checkpoint may lack a part; but a part that is there must
    be there whole, and nothing may be left over.

    The model's direct children are the parts; keys are ``<part>.<name>``; the ``required`` parts must be
    there. ``source`` says in messages where the state comes from. Returns the names of what was loaded.

    Raises:
        ModelLoadError: names the unexpected, missing or misshapen keys. Nothing is loaded then.
    """
    full = nn.Module.state_dict(model, keep_vars=True)  # whatever a stage chooses to save
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    own = {name: tensor for name, tensor in tensors if name in full}
    present = {key.split(".", 1)[0] for key in state}
    whole = {key for key in own if key.split(".", 1)[0] in present}
    remedy = "Was it made with another geometry or another config?"
    _refuse(state.keys() - own.keys(), source, "has {} unexpected keys", remedy)
    if absent := set(required) - present:
        raise ModelLoadError(
            f"{source} has no weights of {shorten(sorted(absent))}, which this stage starts from "
            f"(it has {shorten(sorted(present))}). Is it the checkpoint of the right stage?"
        )
    _refuse(whole - state.keys(), source, "lacks {} keys", "Take another checkpoint")
    remedy = "Take the checkpoint of a model of the same geometry"
    _refuse(_misshapen(own, state), source, "does not fit the model in {} weights", remedy)
    with torch.no_grad():
        for key, value in state.items():
            target = own[key]
            if not hasattr(target, "ds_id"):
                target.copy_(value)
                continue
            import deepspeed

            with deepspeed.zero.GatheredParameters([target], modifier_rank=0):
                if torch.distributed.get_rank() == 0:
                    target.copy_(value)
    return sorted(present)


def check_trained_state(
    model: nn.Module,
    state: Mapping[str, torch.Tensor],
    *,
    source: str,
    brought_along: Collection[str] = (),
) -> None:
    """Check that a checkpoint is one of the config that a model was built from; by names and shapes.

    The model is on any device; what its stage trains requires gradients. ``brought_along`` names what the
    checkpoint has without having trained it.

    Raises:
        ModelLoadError: names the missing, unexpected or misshapen keys.
    """
    own = dict(model.named_parameters(remove_duplicate=False))  # a tied weight has two names
    remedy = "Use the config of the stage that made the checkpoint, with the same bases"
    learnt = {name for name, value in own.items() if value.requires_grad}
    needed = learnt & dict(model.named_parameters()).keys()
    absent, strange = needed - state.keys(), state.keys() - own.keys()
    problem = f"has no weights for {{}} of {len(learnt)} parameters that this config trains"
    _refuse(absent, source, problem, remedy)
    _refuse(strange, source, "has {} weights that this config's model does not have", remedy)
    lost = state.keys() - learnt - set(brought_along)
    parts = ", ".join(sorted({name.split(".", 1)[0] for name in lost}))
    problem = f"has learnt {{}} weights of {parts} that this config does not train, and that would be lost"
    _refuse(lost, source, problem, remedy)
    plain = {name: value for name, value in state.items() if not hasattr(own[name], "quant_state")}
    _refuse(_misshapen(own, plain), source, "is of another geometry in {} weights", remedy)


def _refuse(names: Iterable[str], source: str, problem: str, remedy: str) -> None:
    """Raise ``ModelLoadError`` about these names, if there are any; ``{}`` in ``problem`` is their number."""
    if found := sorted(names):
        message = f"{source} {problem.format(len(found))}"
        raise ModelLoadError(f"{message}: {shorten(found, limit=4)}. {remedy}")


def _misshapen(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    # Where ZeRO-3 has partitioned a tensor, ds_shape is that of the whole one.
    shapes = {name: tuple(getattr(own[name], "ds_shape", own[name].shape)) for name in state}
    return [
        f"{name} {tuple(value.shape)} instead of {shapes[name]}"
        for name, value in state.items()
        if tuple(value.shape) != shapes[name]
    ]
