# SPDX-License-Identifier: Apache-2.0

"""A language model whose bos token opens its turns, as SmolLM2's does, by naming it."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gmai_xtuner.checkpoint.tokenizer import load_tokenizer
from gmai_xtuner.core.conversation import Turn
from gmai_xtuner.core.errors import GMAIError
from gmai_xtuner.data.tokenization import ChatTemplate, ConversationTokenizer
from gmai_xtuner.loading import load_model
from tests.model.exporting import export, predictor_of, stage_config, trained_model


def test_a_bos_token_that_opens_each_turn_is_written_once(tiny_bases, tokenizer, tmp_path):
    """A plain Llama folder; its prompts, its end and its export are right with add_bos=False alone."""
    named = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<unk>", pad_token="</s>",
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=1536, hidden_size=96, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True,
        bos_token_id=1535, eos_token_id=1534,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llm")
    named.save_pretrained(tmp_path / "llm")
    (tmp_path / "vision").symlink_to(tiny_bases / "vision")
    base = load_tokenizer(str(tmp_path / "llm"))
    with pytest.raises(GMAIError, match=r"begin with it twice. Set .*add_bos=False"):
        ConversationTokenizer.from_pretrained(base, ChatTemplate.from_xtuner("internlm2_chat"))

    cfg = stage_config(tmp_path, "stage3_instruct")
    cfg.train_dataloader.dataset.add_bos = False
    model = trained_model(cfg)
    predictor = predictor_of(model, tmp_path, add_bos=False)
    turns = (Turn("user", "Is it CT?"),)
    assert predictor.encoder.encode_prompt(turns).tolist().count(1535) == 2  # user, assistant
    assert set(predictor.stop_ids) == {1534}
    again = load_model(export(model, cfg, tmp_path / "export"))
    pixels = np.zeros((336, 336, 3), np.uint8)
    from PIL import Image

    images = [Image.fromarray(pixels)]
    asked = {"max_new_tokens": 8}
    assert again.answer("What?", images, **asked) == predictor.answer("What?", images, **asked)
