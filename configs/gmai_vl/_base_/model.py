# SPDX-License-Identifier: Apache-2.0

# CLIP ViT-L/14-336 -> linear, GELU, linear -> InternLM2.5-7B, which runs as transformers' own Llama.
# GMAI_LLM and GMAI_VISION in the environment name other bases: folders or hub names. Tokenizer and image
# processor are theirs, for the dataset and for exports (gmai_xtuner/core/config.py).

model = dict(
    type="GMAILLaVAModel",
    llm=dict(
        type="gmai_xtuner.checkpoint.bases.load_language_model",
        pretrained_model_name_or_path="{{$GMAI_LLM:internlm/internlm2_5-7b-chat}}",
        torch_dtype="bfloat16",
    ),
    visual_encoder=dict(
        type="gmai_xtuner.checkpoint.bases.load_vision_tower",
        pretrained_model_name_or_path="{{$GMAI_VISION:openai/clip-vit-large-patch14-336}}",
    ),
    visual_select_layer=-2,
    projector_depth=2,
    use_activation_checkpointing=True,
    attention="auto",  # varlen, sdpa_loop
)
