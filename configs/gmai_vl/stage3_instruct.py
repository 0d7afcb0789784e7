# SPDX-License-Identifier: Apache-2.0

# Stage 3, instruction tuning: everything learns (Table 8).
#
#   NPROC_PER_NODE=8 xtuner train configs/gmai_vl/stage3_instruct.py --deepspeed zero3
#
# Starts from stage 2: GMAI_STAGE2 names its work dir, a checkpoint of it or a .pth file.
# Table 8: 32 GPUs, micro-batch 4 x accumulation 4 a GPU, lr 1e-5 cosine, the rest as in stage 1.
_base_ = ["_base_/model.py", "_base_/data.py", "_base_/schedule.py", "_base_/runtime.py"]

model = dict(
    freeze_llm=False,
    freeze_visual_encoder=False,
    pretrained_pth="{{$GMAI_STAGE2:work_dirs/stage2_deep}}",
    pretrained_parts=["projector", "visual_encoder"],
)
train_dataloader = dict(batch_size=4, dataset=dict(stage="stage3"))
optim_wrapper = dict(optimizer=dict(lr=1e-5), accumulative_counts=4)
