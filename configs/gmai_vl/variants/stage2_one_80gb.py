# SPDX-License-Identifier: Apache-2.0

# Stage 2 on one 80 GB card: as Table 8, but for who holds the 512 packs of an optimiser step.
#
#   xtuner train configs/gmai_vl/variants/stage2_one_80gb.py --deepspeed zero2
#
# 32 GPUs x 4 x 4 = 1 GPU x 4 x 128. Memory, in GB: frozen language model 7.74 G x 2 bytes = 15.5; tower and
# projector 0.32 G x 20 = 6.5 (see stage 1); reduce buckets 1.6; activations of 8,192 tokens about 6.
# About 27 of 80 if all layers are recomputed in the backward pass; none is (58 GiB by the preflight, 2 of it
# allowance; 31 % fewer operations).
_base_ = ["../stage2_deep.py"]

model = dict(recomputed_layers=0, pretrained_pth="{{$GMAI_STAGE1:work_dirs/stage1_one_80gb}}")
optim_wrapper = dict(accumulative_counts=128)
default_hooks = dict(checkpoint=dict(interval=16))
