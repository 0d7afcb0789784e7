# SPDX-License-Identifier: Apache-2.0

# AdamW and one cosine over one epoch (Table 8). The paper names no warm-up; 3 % is what the authors'
# command line takes when none is given (xtuner's LLaVA default).

optim_wrapper = dict(
    type="AmpOptimWrapper",
    dtype="bfloat16",
    optimizer=dict(type="AdamW", betas=(0.9, 0.999), weight_decay=0.0),
    clip_grad=dict(max_norm=1.0),
)

param_scheduler = dict(type="WarmupCosineLR", warmup_ratio=0.03, by_epoch=False)

train_cfg = dict(type="PackedTrainLoop", max_epochs=1, val_interval=125)  # optimiser steps
