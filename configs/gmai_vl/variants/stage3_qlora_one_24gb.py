# SPDX-License-Identifier: Apache-2.0

# Stage 3 on one 24 GB card: QLoRA, the adapters of stage3_lora_one_80gb.py on a 4-bit language model.
#
#   xtuner train configs/gmai_vl/variants/stage3_qlora_one_24gb.py --deepspeed zero2
#
# 32 GPUs x 4 x 4 = 1 GPU x 2 x 256. Memory, in GB: the decoder's linear layers 6.98 G x 0.516 bytes (NF4 with
# double quantisation) = 3.6; embedding, norms and head 0.76 G x 2 = 1.5; the tower 0.6; what learns 0.38 G
# x 20 = 7.7; reduce buckets 1.6; activations of 4,096 tokens about 3.5. About 18.5;
# the preflight counts 15.5 GiB, without its allowance.
#
# NF4, double quantisation, bf16 computation: QLoRA (arXiv 2305.14314), sections 3 and 4. Learning rate and
# adapters as in stage3_lora_one_80gb.py. bitsandbytes must fit this torch's CUDA, see docs/lora.md. Convert
# with --cfg-options model.llm.quantization_config=None: adapters are merged into the full-precision base.
_base_ = ["stage3_lora_one_80gb.py"]

model = dict(
    llm=dict(
        quantization_config=dict(
            type="transformers.BitsAndBytesConfig",
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype="bfloat16",
        ),
    ),
    recomputed_layers=None,  # all
    loss_chunk_size=512,
    pretrained_pth="{{$GMAI_STAGE2:work_dirs/stage2_one_24gb}}",
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(accumulative_counts=256)
default_hooks = dict(checkpoint=dict(interval=4))
