"""Conversation -> token ids and the spans of them that are learnt.

One conversation, as text and as xtuner 0.2.0 lays it out for InternLM2 (``|`` where pieces are encoded
apart, so that training sees the very ids that a prompt has at generation)::

    <s> | <|im_start|>user\\n | <image> | \\nWhat is shown?<|im_end|>\\n<|im_start|>assistant\\n |
    A chest X-ray.<|im_end|> | \\n | <|im_start|>user\\n...
    ^^^^^^^^^^^^^^^^^^^^^^^^ learnt; everything else is context

An image is one placeholder (-200) here; the dataset widens it to the vision tower's number of tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from gmai_xtuner.core.constants import IGNORE_INDEX, IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from gmai_xtuner.core.conversation import Conversation, Turn, parse_record
from gmai_xtuner.core.errors import DataError, GMAIError
from gmai_xtuner.data.word_cache import WordCache


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """How turns become text; the fields of xtuner's ``PROMPT_TEMPLATE``.

    Args:
        system: text around a system turn, with ``{system}``.
        user: text around a user turn up to where the assistant begins, with ``{input}``.
        suffix: what ends an assistant turn; learnt.
        suffix_is_eos: no ``</s>`` after the suffix and no ``<s>`` before later turns.
        separator: between turns; not learnt.
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
        """The template of this name in ``xtuner.utils.PROMPT_TEMPLATE``.

        Raises:
            GMAIError: there is none, or it does not say how an assistant turn ends.
        """
        from xtuner.utils import PROMPT_TEMPLATE

        if name not in PROMPT_TEMPLATE:
            raise GMAIError(
                f"xtuner has no prompt template {name!r}; it has {', '.join(sorted(PROMPT_TEMPLATE))}"
            )
        fields = PROMPT_TEMPLATE[name]
        return cls(
            system=fields.get("SYSTEM", "{system}\n"),
            user=fields["INSTRUCTION"],
            suffix=fields.get("SUFFIX", ""),
            suffix_is_eos=fields.get("SUFFIX_AS_EOS", False),
            separator=fields.get("SEP", ""),
            add_bos=add_bos,
        )


@dataclass(frozen=True, slots=True)
class TokenizedConversation:
    """Ids with one placeholder an image, and what is learnt of them.

    ``label_spans``: int32 ``[spans, 2]``, half-open, in ``input_ids``; ``turn_ends``: where the
    conversation may be cut, one an assistant turn, as (ids, spans, images) so far.
    """

    id: str
    input_ids: np.ndarray
    label_spans: np.ndarray
    images: tuple[str, ...]
    turn_ends: tuple[tuple[int, int, int], ...]

    def num_tokens(self, num_image_tokens: int) -> int:
        """Length in the sequence, image tokens counted."""
        return len(self.input_ids) + len(self.images) * (num_image_tokens - 1)

    @property
    def num_labels(self) -> int:
        return int((self.label_spans[:, 1] - self.label_spans[:, 0]).sum())

    @property
    def labels(self) -> np.ndarray:
        """int32 as long as ``input_ids``: the id where it is learnt, -100 elsewhere."""
        labels = np.full_like(self.input_ids, IGNORE_INDEX)
        for start, end in self.label_spans:
            labels[start:end] = self.input_ids[start:end]
        return labels


class ConversationTokenizer:
    """Batched tokenising of conversations with a fast tokenizer.

    Args:
        tokenizer: the Rust tokenizer (``PreTrainedTokenizerFast.backend_tokenizer``).
        template: how turns become text.
        bos_token_id: id of ``<s>``.
        eos_token_id: id of ``</s>``, used where the template's suffix is not itself the end.

    Picklable and free of torch, so that cache workers stay small.
    """

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate, *, bos_token_id: int, eos_token_id: int
    ) -> None:
        self.tokenizer = tokenizer
        self._words = WordCache.of(tokenizer)
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
        return cls(
            backend,
            template,
            bos_token_id=-1 if bos is None else bos,
            eos_token_id=-1 if eos is None else eos,
        )

    @property
    def fingerprint(self) -> str:
        """Changes whenever the ids could: vocabulary, merges, normaliser, added tokens, template."""
        state = json.dumps(
            [
                self.tokenizer.to_str(),
                asdict(self.template),
                self.bos_token_id,
                self.eos_token_id,
            ],
            sort_keys=True,
        )
        return hashlib.sha256(state.encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "tokenizer": self.tokenizer.to_str(), "_words": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, tokenizer=Tokenizer.from_str(state["tokenizer"]))
        self._words = WordCache.of(self.tokenizer)

    def __call__(self, conversations: Sequence[Conversation]) -> list[TokenizedConversation]:
        """Tokenise a batch with one call of the fast tokenizer."""
        layouts = [self._layout(conversation) for conversation in conversations]
        texts = list({piece for layout in layouts for piece, _ in layout if isinstance(piece, str)})
        ids = {
            text: np.array(text_ids, dtype=np.int32)
            for text, text_ids in zip(texts, self._encode(texts), strict=True)
        }
        return [
            self._assemble(conversation, layout, ids)
            for conversation, layout in zip(conversations, layouts, strict=True)
        ]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        if self._words is not None:
            return self._words(texts)
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def encode_prompt(self, turns: Sequence[Turn], images: Sequence[str] = ()) -> np.ndarray:
        """int32 ids up to where the assistant is to answer, one placeholder an image.

        The very ids that training had before the answer.
        """
        open_end = (*turns, Turn("assistant", ""))
        (tokenized,) = self([Conversation("prompt", open_end, tuple(images))])
        return tokenized.input_ids[: tokenized.label_spans[-1, 0]]

    def _layout(self, conversation: Conversation) -> list[tuple[str | int | None, bool]]:
        """Pieces in order: (text, or a token id, or ``None`` for the end of a turn; learnt?)."""
        template = self.template
        layout: list[tuple[str | int | None, bool]] = []
        needs_bos = template.add_bos
        context, round_number = "", 0
        for turn in conversation.turns:
            if turn.role == "system":
                context += template.system.format(system=turn.text)
            elif turn.role == "user":
                round_number += 1
                context += template.user.format(input=turn.text, round=round_number)
            else:
                if needs_bos:
                    layout.append((self.bos_token_id, False))
                for index, piece in enumerate(context.split(IMAGE_TOKEN)):
                    if index:
                        layout.append((IMAGE_TOKEN_INDEX, False))
                    if piece:
                        layout.append((piece, False))
                layout.append((turn.text + template.suffix, True))
                if not template.suffix_is_eos:
                    layout.append((self.eos_token_id, True))
                needs_bos = template.add_bos and not template.suffix_is_eos
                if template.separator:
                    layout.append((template.separator, False))
                layout.append((None, False))
                context = ""
        return layout

    def _assemble(
        self,
        conversation: Conversation,
        layout: list[tuple[str | int | None, bool]],
        ids: Mapping[str, np.ndarray],
    ) -> TokenizedConversation:
        pieces: list[np.ndarray] = []
        spans: list[tuple[int, int]] = []
        turn_ends: list[tuple[int, int, int]] = []
        length = images = 0
        for piece, learnt in layout:
            if piece is None:
                turn_ends.append((length, len(spans), images))
                continue
            piece_ids = ids[piece] if isinstance(piece, str) else np.array([piece], np.int32)
            images += piece == IMAGE_TOKEN_INDEX
            pieces.append(piece_ids)
            end = length + len(piece_ids)
            # The first token of a conversation has nothing before it to be predicted from.
            start = max(length, 1)
            if learnt and start < end:
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
    """Cut a conversation between turns so that it fits, or give it up.

    Args:
        tokenized: the whole conversation.
        max_length: tokens of a pack, image tokens counted.
        num_image_tokens: tokens of one image.
        over_length: ``cut`` keeps as many whole turns from the beginning as fit; ``drop`` keeps none.
        max_images: images of a pack.

    Returns:
        the conversation itself if it fits, a shorter one, or ``None`` if nothing fits.
    """

    def fits(ids: int, images: int) -> bool:
        within = max_images is None or images <= max_images
        return ids + images * (num_image_tokens - 1) <= max_length and within

    if fits(len(tokenized.input_ids), len(tokenized.images)):
        return tokenized
    if over_length == "drop":
        return None
    for ids, spans, images in reversed(tokenized.turn_ends):
        if fits(ids, images):
            return replace(
                tokenized,
                input_ids=tokenized.input_ids[:ids],
                label_spans=tokenized.label_spans[:spans],
                images=tokenized.images[:images],
                turn_ends=tuple(end for end in tokenized.turn_ends if end[0] <= ids),
            )
    return None


@lru_cache(maxsize=4)
def _batched(
    tokenizer: PreTrainedTokenizerFast, template: ChatTemplate, size: int
) -> ConversationTokenizer:
    """Made once, not for each record: 0.8 s for 92,544 ids. ``size`` sees tokens that are added."""
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
    """xtuner's kind of map function: one record -> what soft packing needs of it.

    Args:
        example: a record in LLaVA / GMAI-VL or OpenAI form.
        tokenizer: a fast tokenizer.
        prompt_template: name in ``xtuner.utils.PROMPT_TEMPLATE``.
        add_bos: see :class:`ChatTemplate`.
        num_image_tokens: tokens that one image takes in the sequence.
        dataset: name for error messages.

    Returns:
        ``input_ids`` and ``labels`` (one placeholder an image), ``num_tokens`` (image tokens counted),
        ``num_labels``, ``images``, ``id``.

    Raises:
        DataError: the record is not a conversation; says why.
    """
    conversation = parse_record(example, dataset=dataset, where="1")
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
