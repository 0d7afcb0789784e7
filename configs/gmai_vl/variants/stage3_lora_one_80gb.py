# SPDX-License-Identifier: Apache-2.0

# Stage 3 on one 80 GB card: LoRA on the language model and the vision tower; the projector learns as it is.
#
#   xtuner train configs/gmai_vl/variants/stage3_lora_one_80gb.py --deepspeed zero2
#
# 32 GPUs x 4 x 4 = 1 GPU x 4 x 128. Training everything needs 8.06 G x 20 bytes = 161 GB. Here, in GB:
# frozen weights 8.04 G x 2 = 16.1; what learns, 0.38 G (adapters 335.5 M and 27.1 M, projector 21.0 M),
# x 20 = 7.7 (see stage 1); reduce buckets 1.6; activations of 8,192 tokens about 7.
# About 29 of 80 if all layers are recomputed in the backward pass; 21 of 32 keep their activations instead (74 GiB by
# the preflight, 2 of it allowance; 20 % fewer operations). On 141 GB none need be recomputed (98 GiB).
#
# Adapters: on the language model r 128, alpha 256, the numbers of LLaVA-1.5's LoRA run
# (github.com/haotian-liu/LLaVA at 200398e, scripts/v1_5/finetune_lora.sh); on the tower r 64, alpha 16, and
# dropout 0.05 on both, those of xtuner 0.2.0's llava_internlm2_chat_7b_qlora_..._lora_e1_gpu8_finetune.
# Learning rate 1e-4: ten times Table 8's 1e-5, as LLaVA-1.5 takes 2e-4 with LoRA and 2e-5 without. The
# projector gets it too, as in stage 2 of Table 8 (DeepSpeed under xtuner knows one rate only).
_base_ = ["../stage3_instruct.py"]

model = dict(
    recomputed_layers=11,
    freeze_llm=True,
    freeze_visual_encoder=True,
    llm_lora=dict(
        type="peft.LoraConfig", r=128, lora_alpha=256, lora_dropout=0.05, task_type="CAUSAL_LM"
    ),
    visual_encoder_lora=dict(type="peft.LoraConfig", r=64, lora_alpha=16, lora_dropout=0.05),
    pretrained_pth="{{$GMAI_STAGE2:work_dirs/stage2_one_80gb}}",
)
optim_wrapper = dict(optimizer=dict(lr=1e-4), accumulative_counts=128)
default_hooks = dict(checkpoint=dict(interval=16))
