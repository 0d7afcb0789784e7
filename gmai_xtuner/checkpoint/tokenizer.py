# SPDX-License-Identifier: Apache-2.0

"""Tokenizers as native ``PreTrainedTokenizerFast``: no remote code.

A folder with ``tokenizer.json`` is used as it is. A folder with the sentencepiece model alone, as
InternLM2's on the hub, is converted by the flags of its own proto:

    text -> split at special tokens -> normalise each part -> BPE merges by score -> byte fallback

so that the ids are those of sentencepiece itself, part by part. InternLM2's proto has no dummy
prefix, keeps all white space and normalises nothing, so decoding gives the text back.

Two differences from sentencepiece: the last six ``[UNUSED_TOKEN_*]`` pieces take the names of
InternLM2's special tokens, and their old names are then plain text. And of two merges with the
very same score sentencepiece takes the leftmost, the fast tokenizer always the same one; InternLM2
has 2,353 such pairs, each of an English and a Chinese piece that can't overlap.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from gmai_xtuner.core.errors import GMAIError, ModelLoadError
from gmai_xtuner.core.hub import read_json, resolve_directory

WORD_MARK = "▁"
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# Values of ModelProto.SentencePiece.Type and TrainerSpec.ModelType in sentencepiece_model.proto.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE_MODEL = 2
_DEFAULT_NAMES = {
    "unk_token": ("<unk>", UNKNOWN),
    "bos_token": ("<s>", CONTROL),
    "eos_token": ("</s>", CONTROL),
}
ANSWER_START, ANSWER_GOES_ON = r"\A", r"(?=[\s\S])"
"""Between these an export's tokenizer has what opens an answer."""


def load_tokenizer(
    pretrained_model_name_or_path: str, *, padding_side: str = "right", **kwargs: Any
) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a checkpoint without remote code.

    What is saved with ``save_pretrained`` loads again with ``AutoTokenizer``, with or without
    ``trust_remote_code``, and gives the same ids.

    Args:
        pretrained_model_name_or_path: a folder in the hub's layout, or a hub name.
        padding_side: ``"right"`` for training, ``"left"`` for batched generation.
        kwargs: entries that replace those of ``tokenizer_config.json``, e.g. ``add_bos_token``;
            ``trust_remote_code`` is accepted, since configs carry it, and has no meaning here.

    Raises:
        ModelLoadError: no tokenizer file, a damaged one, or one that can't be converted exactly.
    """
    kwargs.pop("trust_remote_code", None)
    directory = resolve_directory(pretrained_model_name_or_path, weights=False)
    settings = {**_read_settings(directory), "padding_side": padding_side, **kwargs}
    settings.setdefault("clean_up_tokenization_spaces", False)
    if isinstance(extra := settings.get("extra_special_tokens"), list):
        # transformers 5 writes a list under the name that 4.48 has for named ones.
        renamed = {"extra_special_tokens": {}, "additional_special_tokens": extra}
        settings |= renamed
        kwargs = renamed | kwargs
    try:
        if (directory / "tokenizer.json").is_file():
            tokenizer = _load_fast(directory, settings, kwargs)
        elif (directory / "tokenizer.model").is_file():
            tokenizer = _load_sentencepiece(directory / "tokenizer.model", settings)
        else:
            raise ModelLoadError(
                f"{directory} has neither tokenizer.json nor tokenizer.model. Copy one of them from "
                "the checkpoint on the hub."
            )
    except GMAIError:
        raise
    except Exception as error:  # tokenizers raises no narrower class
        raise ModelLoadError(
            f"the tokenizer in {directory} can't be read ({type(error).__name__}: {str(error)[:200]}). "
            "Copy its files again from the checkpoint on the hub."
        ) from error
    tokenizer.name_or_path = str(pretrained_model_name_or_path)
    return tokenizer


def _read_settings(directory: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            settings.update(read_json(directory / name))
    template = directory / "chat_template.jinja"
    if template.is_file():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    return settings


def _load_fast(
    directory: Path, settings: Mapping[str, Any], overrides: Mapping[str, Any]
) -> PreTrainedTokenizerFast:
    name = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    cls = getattr(transformers, f"{name}Fast", PreTrainedTokenizerFast)
    kept = ("padding_side", "clean_up_tokenization_spaces", "chat_template")
    options = {key: settings[key] for key in kept if key in settings}
    tokenizer = cls.from_pretrained(str(directory), **{**overrides, **options})
    tokenizer.init_kwargs.pop("auto_map", None)
    _join_answers(tokenizer)
    if cls is PreTrainedTokenizerFast and {"add_bos_token", "add_eos_token"} & set(settings):
        _add_bos_and_eos(tokenizer, settings)
    return tokenizer


def _join_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    """Take out the split before answers of a plain LLaVA export: our code encodes them apart by itself."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizer, before = state["normalizer"], state["pre_tokenizer"]
    steps = before.get("pretokenizers", [before]) if before else []
    if not steps or not _is_answer_split(steps[0]):
        return
    steps = list(itertools.dropwhile(_is_answer_split, steps))
    whole = {"type": "Sequence", "pretokenizers": steps} if steps else None
    state["pre_tokenizer"] = steps[0] if len(steps) == 1 else whole
    if normalizer and normalizer["type"] == "Sequence":
        kept = [step for step in normalizer["normalizers"] if not _is_answer_mark(step)]
        state["normalizer"] = kept[0] if len(kept) == 1 else {**normalizer, "normalizers": kept}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _is_answer_mark(step: Mapping[str, Any]) -> bool:
    pattern = step["pattern"].get("Regex", "") if step["type"] == "Replace" else ""
    return pattern.startswith(ANSWER_START) and pattern.endswith(ANSWER_GOES_ON)


def _is_answer_split(step: Mapping[str, Any]) -> bool:
    return (
        step["type"] == "Split"
        and step["behavior"] == "Isolated"
        and str(step["pattern"].get("Regex", "")).startswith(ANSWER_START)
    )


def _load_sentencepiece(path: Path, settings: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ModelLoadError(
            f"{path} is no sentencepiece model or is cut short. Copy it again."
        ) from error
    _check_convertible(proto, path)
    special: dict[int, AddedToken] = {}
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        flags = {"normalized": False, "special": True}
        if not isinstance(token, str):
            known = ("lstrip", "rstrip", "single_word", "normalized", "special")
            flags |= {key: token[key] for key in known if key in token}
        special[int(index)] = AddedToken(_content(token), **flags)
    backend = _convert(proto, special, path)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    names = {key: _content(settings[key]) for key in NAMED_TOKENS if settings.get(key)}
    pieces = {(piece.piece, piece.type) for piece in proto.pieces}
    for key, piece in _DEFAULT_NAMES.items():
        if piece in pieces:
            names.setdefault(key, piece[0])
    additional = [_content(token) for token in settings.get("additional_special_tokens") or ()]
    if homeless := [t for t in [*names.values(), *additional] if t not in vocabulary]:
        raise ModelLoadError(
            f"{path.parent / 'tokenizer_config.json'}: the special tokens {homeless} have no id in "
            "the vocabulary. Give them one in 'added_tokens_decoder', as InternLM2.5 does."
        )
    kept = ("model_max_length", "chat_template", "clean_up_tokenization_spaces")
    options = {key: settings[key] for key in kept if settings.get(key) is not None}
    if additional:
        options["additional_special_tokens"] = additional
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **names,
        **options,
        padding_side=settings["padding_side"],
        add_bos_token=bool(settings.get("add_bos_token", True)),
        add_eos_token=bool(settings.get("add_eos_token", False)),
    )
    _add_bos_and_eos(tokenizer, tokenizer.init_kwargs)
    return tokenizer


def _content(token: Mapping[str, Any] | str) -> str:
    return token if isinstance(token, str) else token["content"]


def _check_convertible(proto: Any, path: Path) -> None:
    """Refuse what the fast tokenizer could only imitate."""
    types = {piece.type for piece in proto.pieces}
    known = {piece.piece for piece in proto.pieces if piece.type in (NORMAL, UNUSED)}
    unused = (piece.piece for piece in proto.pieces if piece.type == UNUSED)
    prefix = proto.normalizer_spec.add_dummy_prefix
    problems = {
        "it has no unknown piece": UNKNOWN not in types,
        "it is no BPE model": proto.trainer_spec.model_type != BPE_MODEL,
        "it marks words at their end": proto.trainer_spec.treat_whitespace_as_suffix,
        "it has unused pieces that merges pass through": any(
            any(_splits(name, known)) for name in unused
        ),
        "it has both user-defined pieces and a dummy prefix": prefix and USER_DEFINED in types,
    }
    if problem := next((text for text, is_so in problems.items() if is_so), None):
        raise ModelLoadError(
            f"{path} can't be converted exactly: {problem}. Save the tokenizer as tokenizer.json "
            "with the model's own code and put that file beside it."
        )


def _convert(proto: Any, special: Mapping[int, AddedToken], path: Path) -> Tokenizer:
    """Sentencepiece BPE to a ``tokenizers.Tokenizer`` with the same ids.

    An id of a special token within the proto renames its piece; the ids beyond must follow on without a gap.
    """
    renamed = {index: token.content for index, token in special.items()}
    names = [renamed.get(index, piece.piece) for index, piece in enumerate(proto.pieces)]
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ModelLoadError(f"{path}: pieces that occur twice: {twice}.")
    unknown = [index for index, piece in enumerate(proto.pieces) if piece.type == UNKNOWN]
    backend = Tokenizer(
        BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=_merges(proto, special),
            unk_token=names[unknown[0]],
            fuse_unk=True,  # sentencepiece makes one unknown of a run of them
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    added = dict(special)
    for index, piece in enumerate(proto.pieces):
        if index not in added and piece.type in (UNKNOWN, CONTROL):
            added[index] = AddedToken(piece.piece, normalized=False, special=True)
        elif index not in added and piece.type == USER_DEFINED:
            # Matched in the normalised text, as sentencepiece does.
            added[index] = AddedToken(piece.piece, normalized=True, special=False)
    backend.normalizer = _normalizer(proto.normalizer_spec)
    backend.add_tokens([added[index] for index in sorted(added)])
    for index, token in added.items():
        if (given := backend.token_to_id(token.content)) != index:
            raise ModelLoadError(
                f"{path}: the special token {token.content!r} should have id {index}, but the "
                f"{len(names)} pieces leave it {given}. Copy tokenizer_config.json again."
            )
    steps = [decoders.Replace(WORD_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if proto.normalizer_spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _splits(name: str, known: Container[str]) -> Iterator[tuple[str, str]]:
    for cut in range(1, len(name)):
        if name[:cut] in known and name[cut:] in known:
            yield name[:cut], name[cut:]


def _merges(proto: Any, special: Mapping[int, AddedToken]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, best score first.

    Sentencepiece merges whatever makes the piece of the best score; control, byte and
    user-defined pieces neither merge nor arise from merges.
    """
    scores = {
        piece.piece: piece.score
        for index, piece in enumerate(proto.pieces)
        if piece.type == NORMAL and index not in special
    }
    merges = [
        (-score, -len(left), left, right)
        for name, score in scores.items()
        for left, right in _splits(name, scores)
    ]
    return [(left, right) for _, _, left, right in sorted(merges)]


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(WORD_MARK if spec.escape_whitespaces else " "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", WORD_MARK))
    return normalizers.Sequence(steps)


def _add_bos_and_eos(tokenizer: PreTrainedTokenizerFast, settings: Mapping[str, Any]) -> None:
    """Let ``add_special_tokens=True`` put ``<s>`` before and ``</s>`` after, as the flags say."""
    names: dict[str, str | None] = {}
    for flag, name in (("add_bos_token", "bos_token"), ("add_eos_token", "eos_token")):
        wanted = bool(settings.get(flag))
        names[name] = getattr(tokenizer, name) if wanted else None
        if wanted and names[name] is None:
            raise ModelLoadError(f"tokenizer_config.json sets {flag} but names no {name}.")
        tokenizer.init_kwargs[flag] = wanted

    def template(part: str, kind: int) -> list[str]:
        parts = (names["bos_token"], f"${part}", names["eos_token"])
        return [f"{name}:{kind}" for name in parts if name is not None]

    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template("A", 0),
        pair=[*template("A", 0), *template("B", 1)],
        special_tokens=[
            (name, tokenizer.convert_tokens_to_ids(name)) for name in names.values() if name
        ],
    )
