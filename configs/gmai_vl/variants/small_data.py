# SPDX-License-Identifier: Apache-2.0

# A few hundred to a few thousand records, any stage: short packs, few of them a step, more of them held out.
#
#   GMAI_STAGE=stage1_shallow xtuner train configs/gmai_vl/variants/small_data.py --deepspeed zero2
#
# GMAI_STAGE names the stage's config (default: stage3_instruct). 2,048-token packs, 16 of them a step and GPU,
# would make one step of a few hundred records, and a thousandth of them held out is nothing. With few images
# hold out more: train_dataloader.dataset.held_out=0.2. Intervals are in optimiser steps.
_base_ = ["../{{$GMAI_STAGE:stage3_instruct}}.py"]

train_dataloader = dict(batch_size=1, dataset=dict(max_length=1024, held_out=0.05))
optim_wrapper = dict(accumulative_counts=2)
default_hooks = dict(checkpoint=dict(interval=50), sample_answer=dict(interval=25))
train_cfg = dict(max_epochs=10, val_interval=25)
