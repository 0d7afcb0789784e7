# SPDX-License-Identifier: Apache-2.0

# Stage 2, deep alignment: the projector and the vision tower learn (Table 8).
#
#   NPROC_PER_NODE=8 xtuner train configs/gmai_vl/stage2_deep.py --deepspeed zero2
#
# Starts from stage 1: GMAI_STAGE1 names its work dir, a checkpoint of it or a .pth file.
# Table 8: 32 GPUs, micro-batch 4 x accumulation 4 a GPU, lr 1e-4 cosine, the rest as in stage 1.
_base_ = ["_base_/model.py", "_base_/data.py", "_base_/schedule.py", "_base_/runtime.py"]

model = dict(
    freeze_llm=True,
    freeze_visual_encoder=False,
    pretrained_pth="{{$GMAI_STAGE1:work_dirs/stage1_shallow}}",
    pretrained_parts=["projector"],
)
train_dataloader = dict(batch_size=4, dataset=dict(stage="stage2"))
optim_wrapper = dict(optimizer=dict(lr=1e-4), accumulative_counts=4)
