# SPDX-License-Identifier: Apache-2.0

"""Asks vLLM or llama.cpp in their own environment (tests/engines.py); knows nothing of this project.

``ask_engine.py vllm|llama FOLDER`` reads a JSON list of ``{"text": ..., "images": [...]}`` from standard
input; its last line is a JSON list of the greedy answers' token ids.
"""

import base64
import json
import sys
from pathlib import Path

LENGTH = 12


def content_of(question, *, line_break):
    """OpenAI's parts; llama.cpp joins them without the line break that the chat template writes."""
    urls = [
        "data:image/png;base64," + base64.b64encode(Path(image).read_bytes()).decode()
        for image in question["images"]
    ]
    text = ("\n" if urls and not line_break else "") + question["text"]
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def ask_vllm(folder, questions):
    from vllm import LLM, SamplingParams

    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=512)
    greedy = SamplingParams(temperature=0, max_tokens=LENGTH)
    return [
        list(llm.chat(content_of(one, line_break=True), greedy)[0].outputs[0].token_ids)
        for one in questions
    ]


def ask_llama(folder, questions):
    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path = f"{folder}/model.gguf"
    params.mmproj.path = f"{folder}/mmproj.gguf"
    params.n_ctx, params.n_parallel = 1024, 1
    params.warmup = params.fit_params = False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama.Server(params)
    answers = []
    for one in questions:
        said = server.handle_chat_completions(
            {
                "messages": content_of(one, line_break=False),
                "max_tokens": LENGTH,
                "temperature": 0,
                "logprobs": True,
                "cache_prompt": False,
            }
        )
        answers.append([token["id"] for token in said["choices"][0]["logprobs"]["content"]])
    return answers


if __name__ == "__main__":
    found = {"vllm": ask_vllm, "llama": ask_llama}[sys.argv[1]](sys.argv[2], json.load(sys.stdin))
    print("\n" + json.dumps(found))
