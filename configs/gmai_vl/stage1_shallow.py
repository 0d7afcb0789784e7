# SPDX-License-Identifier: Apache-2.0

# Stage 1, shallow alignment: only the projector learns (Table 8).
#
#   NPROC_PER_NODE=8 xtuner train configs/gmai_vl/stage1_shallow.py --deepspeed zero2
#
# Table 8: 32 GPUs, micro-batch 8 x accumulation 2 a GPU, lr 1e-3 cosine, AdamW (0.9, 0.999), 336 px,
# dropout 0, bf16, soft packing.
_base_ = ["_base_/model.py", "_base_/data.py", "_base_/schedule.py", "_base_/runtime.py"]

model = dict(freeze_llm=True, freeze_visual_encoder=True)
train_dataloader = dict(batch_size=8, dataset=dict(stage="stage1"))
optim_wrapper = dict(optimizer=dict(lr=1e-3), accumulative_counts=2)
