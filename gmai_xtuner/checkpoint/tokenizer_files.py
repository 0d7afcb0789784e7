# SPDX-License-Identifier: Apache-2.0

"""Tokenizer and chat template of a plain LLaVA folder: the ids of training, without our code.

Three things differ from the base's tokenizer:

- ``<image>`` is a token (and ``<pad>``, where the base has none); they follow after the last id.
- It adds no ``<s>`` by itself. The chat template writes it where training had it, so that
  ``processor(text=...)``, ``apply_chat_template(tokenize=True)`` and servers, which differ in whether they
  ask for special tokens, all get the same ids.
- What opens the assistant's turn is split from the answer. Training encodes an answer apart from its prompt;
  in a conversation so far, read as one text, a merge might reach over that border.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gmai_xtuner.checkpoint.tokenizer import ANSWER_GOES_ON, ANSWER_START
from gmai_xtuner.core.constants import IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.core.templates import environment
from gmai_xtuner.data.log import warn
from gmai_xtuner.data.tokenization import ChatTemplate, ConversationTokenizer

PAD_TOKEN = "<pad>"
_HEADERS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|assistant|>")
"""What a turn begins with in templates that say so; the assistant's is the last in the user's text."""

PROBES: tuple[tuple[Turn, ...], ...] = (
    (Turn("user", f"{IMAGE_TOKEN}\nWhat is shown?"),),
    (Turn("user", "1 + 1 ="),),
    (
        Turn("system", "You are a radiologist."),
        Turn("user", f"{IMAGE_TOKEN}\n{IMAGE_TOKEN}\nCompare  the two: {IMAGE_TOKEN}?"),
    ),
    (
        Turn("user", f"图中显示什么？{IMAGE_TOKEN}"),
        Turn("assistant", "胸部X光片。"),
        Turn("user", "Any pneumothorax?"),
        Turn("assistant", "\nNo.\n\n- left: none\n"),
        Turn("user", " why "),
    ),
)
"""Prompts that must have the ids of training: with a system turn, images in places, several turns."""


def chat_template(template: ChatTemplate) -> str:
    """The Jinja template that writes a conversation as training did.

    Content is a text, whose ``<image>`` marks are images, or a list of parts (``text``, ``image``,
    ``image_url``), joined by line breaks as in training.
    """
    before, after = _around(template.user, "{input}")
    end_of_user, opening = split_opening(after)
    system_before, system_after = _around(template.system, "{system}")
    templates = environment(
        "gmai_xtuner.checkpoint",
        keep_trailing_newline=True,
        variable_start_string="[[",
        variable_end_string="]]",
        block_start_string="[%",
        block_end_string="%]",
        comment_start_string="[#",
        comment_end_string="#]",
    )
    return templates.get_template("chat_template.j2").render(
        add_bos=template.add_bos,
        bos_again=template.add_bos and not template.suffix_is_eos,
        suffix_is_eos=template.suffix_is_eos,
        image=_quoted(IMAGE_TOKEN),
        system_before=_quoted(system_before),
        system_after=_quoted(system_after),
        before=_with_round(before),
        end_of_user=_with_round(end_of_user),
        opening=_quoted(opening),
        end=_quoted(template.suffix),
        separator=_quoted(template.separator),
    )


def _around(text: str, mark: str) -> tuple[str, str]:
    before, found, after = text.partition(mark)
    if not found:
        raise GMAIError(f"the prompt template has no {mark}: {text!r}")
    return before, after


def split_opening(after: str) -> tuple[str, str]:
    """Split what follows a user's text: (the end of that turn, the beginning of the assistant's)."""
    place = max(0, *(after.rfind(header) for header in _HEADERS))
    return after[:place], after[place:]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _with_round(text: str) -> str:
    parts = [_quoted(part) for part in text.split("{round}")]
    return " + (ns.rounds | string) + ".join(parts)


def plain_tokenizer(
    base: PreTrainedTokenizerFast, template: ChatTemplate
) -> PreTrainedTokenizerFast:
    """The tokenizer of the folder; ``base``, the language model's, is not changed.

    Raises:
        GMAIError: questions by its chat template have other ids than in training. For earlier answers of a
            conversation that is a warning: some templates have no mark behind which to split.
    """
    backend = Tokenizer.from_str(base.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    pad = PAD_TOKEN if base.pad_token is None else base.pad_token
    for text in (IMAGE_TOKEN, *([PAD_TOKEN] if base.pad_token is None else [])):
        backend.add_special_tokens([AddedToken(text, special=True, normalized=False)])
    _split_before_answers(backend, template)
    backend.post_processor = processors.TemplateProcessing(single="$A:0", pair="$A:0 $B:1")
    names = ("bos_token", "eos_token", "unk_token")
    named = {name: value for name in names if (value := getattr(base, name)) is not None}
    further = [token for token in base.additional_special_tokens if token != IMAGE_TOKEN]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **named,
        pad_token=pad,
        additional_special_tokens=[*further, IMAGE_TOKEN],
        padding_side="left",  # to generate for several prompts at once
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],  # LLaVA takes no token types
        chat_template=chat_template(template),
    )
    differ = differing_prompts(tokenizer, ConversationTokenizer.from_pretrained(base, template))
    for turns, where in differ.items():
        if not any(turn.role == "assistant" for turn in turns):
            raise GMAIError(
                f"{where}. This tokenizer can't be exported with this prompt_template; export in xtuner's "
                "layout (--save-format xtuner)"
            )
    if differ:
        warn(
            "with this tokenizer and prompt_template, earlier answers of a conversation have other ids at "
            f"their border than in training; single questions have the same. E.g. {min(differ.values())}"
        )
    return tokenizer


def _split_before_answers(backend: Tokenizer, template: ChatTemplate) -> None:
    _, opening = split_opening(_around(template.user, "{input}")[1])
    added = [token.content for token in backend.get_added_tokens_decoder().values()]
    ends = [opening.rfind(text) + len(text) for text in added if text in opening]
    tail = opening[max(ends, default=0) :]
    if not tail:
        return
    if (normalizer := backend.normalizer) is not None:
        tail = normalizer.normalize_str(tail)
        # Encoded apart, an answer begins with what the normaliser puts before a text ("▁" in Llama 2).
        if prefix := normalizer.normalize_str("x").removesuffix("x"):
            opened = normalizers.Replace(
                Regex(f"{ANSWER_START}{_escaped(tail)}{ANSWER_GOES_ON}"), tail + prefix
            )
            backend.normalizer = normalizers.Sequence([normalizer, opened])
    split = pre_tokenizers.Split(Regex(f"{ANSWER_START}{_escaped(tail)}"), "isolated")
    before = backend.pre_tokenizer
    backend.pre_tokenizer = split if before is None else pre_tokenizers.Sequence([split, before])


def _escaped(text: str) -> str:
    return re.sub(r"([\\^$.|?*+()\[\]{}/#&~-])", r"\\\1", text)


def differing_prompts(
    tokenizer: PreTrainedTokenizerFast, training: ConversationTokenizer
) -> dict[tuple[Turn, ...], str]:
    """Prompts whose ids by the chat template differ from training's, and where they part."""
    image = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    differ: dict[tuple[Turn, ...], str] = {}
    for turns in PROBES:
        expected = training.encode_prompt(turns)
        expected = np.where(expected == IMAGE_TOKEN_INDEX, image, expected).tolist()
        text = prompt_text(tokenizer, turns)
        found = tokenizer(text).input_ids
        if found != expected:
            pairs = enumerate(zip(found, expected, strict=False))
            shorter = min(len(found), len(expected))
            place = next((at for at, (one, other) in pairs if one != other), shorter)
            differ[turns] = (
                f"the prompt {text!r} has other ids than in training from token {place} on: "
                f"{tokenizer.convert_ids_to_tokens(found[place : place + 4])} instead of "
                f"{tokenizer.convert_ids_to_tokens(expected[place : place + 4])}"
            )
    return differ


def prompt_text(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Turn]) -> str:
    """Return a prompt as the chat template writes it."""
    messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.text} for turn in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
