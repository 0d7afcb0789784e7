# SPDX-License-Identifier: Apache-2.0

"""Conversation -> token ids and the spans of them that are supervised.

One conversation, as text and as xtuner 0.2.0 lays it out for InternLM2 (``|`` where pieces are encoded
apart, so that training sees the very ids that a prompt has at generation)::

    <s> | <|im_start|>user\\n | <image> | \\nWhat is shown?<|im_end|>\\n<|im_start|>assistant\\n |
    A chest X-ray.<|im_end|> | \\n | <|im_start|>user\\n...
    ^^^^^^^^^^^^^^^^^^^^^^^^ supervised; everything else is context

An image is one placeholder (-200) here; the dataset widens it to the vision tower's number of tokens.

Token ids of a text come from those of its words, where that is provably the same
(:mod:`gmai_xtuner.data.word_cache`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from gmai_xtuner.core.constants import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from gmai_xtuner.core.conversation import Conversation, Turn, parse_raw
from gmai_xtuner.core.errors import DataError, GMAIError
from gmai_xtuner.core.records import RawRecord
from gmai_xtuner.data.word_cache import WordCache, encode_whole


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How turns become text; the fields of xtuner's ``PROMPT_TEMPLATE``.

    Args:
        system: text around a system turn, with ``{system}``.
        user: text around a user turn up to where the assistant begins, with ``{input}``.
        suffix: what ends an assistant turn; supervised.
        suffix_is_eos: no ``</s>`` after the suffix and no ``<s>`` before later turns.
        separator: between turns; not supervised.
        add_bos: begin with ``<s>``, as InternLM2.5's own template, xtuner's training and ``xtuner
            chat`` do. The authors' code trains without: ``add_bos=False``.
    """

    system: str
    user: str
    suffix: str
    suffix_is_eos: bool
    separator: str
    add_bos: bool = True

    @classmethod
    def from_xtuner(cls, name: str, *, add_bos: bool = True) -> ChatTemplate:
        """Return the template of this name in ``xtuner.utils.PROMPT_TEMPLATE``.

        Raises:
            GMAIError: there is none, or it does not say how an assistant turn ends.
        """
        from xtuner.utils import PROMPT_TEMPLATE

        if name not in PROMPT_TEMPLATE:
            raise GMAIError(
                f"xtuner has no prompt template {name!r}; it has {', '.join(sorted(PROMPT_TEMPLATE))}"
            )
        defaults = {"SYSTEM": "{system}\n", "SUFFIX": "", "SUFFIX_AS_EOS": False, "SEP": ""}
        given: dict[str, Any] = {**defaults, **PROMPT_TEMPLATE[name]}
        texts = given["SYSTEM"], given["INSTRUCTION"], given["SUFFIX"]
        return cls(*texts, given["SUFFIX_AS_EOS"], given["SEP"], add_bos)


class TurnEnd(NamedTuple):
    """Where a conversation may be cut: its ids, label spans and images so far."""

    ids: int
    spans: int
    images: int


@dataclass(frozen=True, slots=True)
class TokenizedConversation:
    """Ids with one placeholder an image, and what is supervised of them.

    ``label_spans``: int32 ``[spans, 2]``, half-open, in ``input_ids``; ``turn_ends``: one an assistant turn.
    """

    id: str
    input_ids: np.ndarray
    label_spans: np.ndarray
    images: tuple[str, ...]
    turn_ends: tuple[TurnEnd, ...]

    def num_tokens(self, num_image_tokens: int) -> int:
        """Return the length in the sequence, image tokens counted."""
        return len(self.input_ids) + len(self.images) * (num_image_tokens - 1)

    @property
    def num_labels(self) -> int:
        return int((self.label_spans[:, 1] - self.label_spans[:, 0]).sum())

    @property
    def labels(self) -> np.ndarray:
        """int32 as long as ``input_ids``: the id where it is supervised, -100 elsewhere."""
        labels = np.full_like(self.input_ids, IGNORE_INDEX)
        for start, end in self.label_spans:
            labels[start:end] = self.input_ids[start:end]
        return labels


class _Piece(NamedTuple):
    """A part that is encoded apart: a text, a token id, or ``None`` for the end of a turn."""

    content: str | int | None
    supervised: bool = False


class ConversationTokenizer:
    """Batched tokenising of conversations with a fast tokenizer.

    ``tokenizer`` is the Rust one (``PreTrainedTokenizerFast.backend_tokenizer``); ``</s>`` is used where the
    template's suffix is not itself the end. Free of torch, so that cache workers stay small.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, *, bos_token_id: int, eos_token_id: int
    ) -> None:
        self.tokenizer = tokenizer
        self._encode = WordCache.of(tokenizer) or partial(encode_whole, tokenizer)
        self.template = template
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id

    @classmethod
    def from_pretrained(
        cls, tokenizer: PreTrainedTokenizerFast, template: ChatTemplate
    ) -> ConversationTokenizer:
        """Raises:
        GMAIError: if the tokenizer has no ``<s>`` or ``</s>`` though the template needs it, or splits
            the template's end-of-turn mark into several tokens (then no answer could be stopped).
        """
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if (template.add_bos and bos is None) or (not template.suffix_is_eos and eos is None):
            raise GMAIError(
                f"the tokenizer {tokenizer.name_or_path!r} has no bos or eos token, which the prompt "
                "template needs. Choose another prompt_template, or add_bos=False"
            )
        if template.add_bos and template.user.startswith(tokenizer.bos_token):
            raise GMAIError(
                f"the bos token of {tokenizer.name_or_path!r}, {tokenizer.bos_token!r}, is what each turn of "
                "this prompt template begins with: prompts would begin with it twice. Set "
                "train_dataloader.dataset.add_bos=False"
            )
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.no_padding()
        backend.no_truncation()
        if template.suffix_is_eos:
            ids = backend.encode(template.suffix, add_special_tokens=False).ids
            if len(ids) != 1:
                raise GMAIError(
                    f"the tokenizer {tokenizer.name_or_path!r} has no token {template.suffix!r} "
                    f"(it becomes {len(ids)} tokens), which ends every answer of this template. "
                    "Is it the tokenizer of the chat model?"
                )
        bos, eos = (-1 if token is None else token for token in (bos, eos))
        return cls(backend, template, bos_token_id=bos, eos_token_id=eos)

    @property
    def fingerprint(self) -> str:
        """Changes whenever the ids could: vocabulary, merges, normaliser, added tokens, template."""
        marks = (self.bos_token_id, self.eos_token_id)
        state = [self.tokenizer.to_str(), asdict(self.template), *marks]
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def __call__(self, conversations: Sequence[Conversation]) -> list[TokenizedConversation]:
        """Tokenise a batch with one call of the fast tokenizer."""
        layouts = [self._layout(conversation) for conversation in conversations]
        contents = {piece.content for layout in layouts for piece in layout}
        texts = [content for content in contents if isinstance(content, str)]
        arrays = (np.array(ids, dtype=np.int32) for ids in self._encode(texts))
        ids = dict(zip(texts, arrays, strict=True))
        return [
            self._assemble(conversation, layout, ids)
            for conversation, layout in zip(conversations, layouts, strict=True)
        ]

    def encode_prompt(self, turns: Sequence[Turn], images: Sequence[str] = ()) -> np.ndarray:
        """Return int32 ids up to where the assistant is to answer, one placeholder an image.

        They are the very ids that training had before the answer.
        """
        open_end = (*turns, Turn("assistant", ""))
        (tokenized,) = self([Conversation("prompt", open_end, tuple(images))])
        return tokenized.input_ids[: tokenized.label_spans[-1, 0]]

    def _layout(self, conversation: Conversation) -> list[_Piece]:
        template = self.template
        layout: list[_Piece] = []
        needs_bos = template.add_bos
        context, rounds = "", 0
        for turn in conversation.turns:
            if turn.role == "system":
                context += template.system.format(system=turn.text)
                continue
            if turn.role == "user":
                rounds += 1
                context += template.user.format(input=turn.text, round=rounds)
                continue
            if needs_bos:
                layout.append(_Piece(self.bos_token_id))
            for index, text in enumerate(context.split(IMAGE_TOKEN)):
                if index:
                    layout.append(_Piece(IMAGE_TOKEN_INDEX))
                if text:
                    layout.append(_Piece(text))
            layout.append(_Piece(turn.text + template.suffix, supervised=True))
            if not template.suffix_is_eos:
                layout.append(_Piece(self.eos_token_id, supervised=True))
            needs_bos = template.add_bos and not template.suffix_is_eos
            if template.separator:
                layout.append(_Piece(template.separator))
            layout.append(_Piece(None))
            context = ""
        return layout

    def _assemble(
        self, conversation: Conversation, layout: list[_Piece], ids: Mapping[str, np.ndarray]
    ) -> TokenizedConversation:
        pieces: list[np.ndarray] = []
        spans: list[tuple[int, int]] = []
        turn_ends: list[TurnEnd] = []
        length = images = 0
        for content, supervised in layout:
            if content is None:
                turn_ends.append(TurnEnd(length, len(spans), images))
                continue
            piece = ids[content] if isinstance(content, str) else np.array([content], np.int32)
            images += content == IMAGE_TOKEN_INDEX
            pieces.append(piece)
            end = length + len(piece)
            # The first token of a conversation has nothing before it to be predicted from.
            start = max(length, 1)
            if supervised and start < end:
                if spans and spans[-1][1] == start:
                    spans[-1] = (spans[-1][0], end)
                else:
                    spans.append((start, end))
            length = end
        return TokenizedConversation(
            id=conversation.id,
            input_ids=np.concatenate(pieces),
            label_spans=np.array(spans, dtype=np.int32).reshape(-1, 2),
            images=conversation.images,
            turn_ends=tuple(turn_ends),
        )


def fit(
    tokenized: TokenizedConversation,
    *,
    max_length: int,
    num_image_tokens: int,
    over_length: str,
    max_images: int | None = None,
) -> TokenizedConversation | None:
    """Return a conversation if it fits into a pack, a shorter one, or ``None`` if nothing fits.

    ``over_length`` ``cut`` keeps as many whole turns from the beginning as fit, ``drop`` none. ``max_length``
    counts image tokens, ``num_image_tokens`` for an image.
    """

    def fits(ids: int, images: int) -> bool:
        within = max_images is None or images <= max_images
        return ids + images * (num_image_tokens - 1) <= max_length and within

    if fits(len(tokenized.input_ids), len(tokenized.images)):
        return tokenized
    ends = [end for end in tokenized.turn_ends if fits(end.ids, end.images)]
    if over_length == "drop" or not ends:
        return None
    return replace(
        tokenized,
        input_ids=tokenized.input_ids[: ends[-1].ids],
        label_spans=tokenized.label_spans[: ends[-1].spans],
        images=tokenized.images[: ends[-1].images],
        turn_ends=tokenized.turn_ends[: len(ends)],
    )


@lru_cache(maxsize=4)
def _batched(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, size: int
) -> ConversationTokenizer:
    """Build a tokenizer once and not for each record (0.8 s); ``size`` notices tokens that are added."""
    return ConversationTokenizer.from_pretrained(tokenizer, template)


def soft_packing_map_fn(
    example: Mapping[str, Any],
    *,
    tokenizer: PreTrainedTokenizerFast,
    prompt_template: str = "internlm2_chat",
    add_bos: bool = True,
    num_image_tokens: int,
    dataset: str = "map_fn",
) -> dict[str, Any]:
    """Turn one record of LLaVA's, GMAI-VL's or OpenAI's form into what soft packing needs, for ``MAP_FUNC``.

    Args:
        example, tokenizer: the record, and a fast tokenizer.
        prompt_template: name in ``xtuner.utils.PROMPT_TEMPLATE``; ``add_bos``: see :class:`ChatTemplate`.
        num_image_tokens: tokens that one image takes in the sequence.
        dataset: name for error messages.

    Returns:
        ``input_ids`` and ``labels`` (one placeholder an image), ``num_tokens`` (image tokens counted),
        ``num_labels``, ``images``, ``id``.

    Raises:
        DataError: the record is not a conversation; says why.
    """
    conversation = parse_raw(RawRecord("1", "", example), dataset=dataset)
    template = ChatTemplate.from_xtuner(prompt_template, add_bos=add_bos)
    (tokenized,) = _batched(tokenizer, template, len(tokenizer))([conversation])
    if tokenized.num_labels == 0:
        raise DataError(
            "nothing to learn", dataset=dataset, record=tokenized.id, reason="no_labels"
        )
    return {
        "id": tokenized.id,
        "input_ids": tokenized.input_ids.tolist(),
        "labels": tokenized.labels.tolist(),
        "num_tokens": tokenized.num_tokens(num_image_tokens),
        "num_labels": tokenized.num_labels,
        "images": list(tokenized.images),
    }
