# SPDX-License-Identifier: Apache-2.0

# Stage 1 on one 80 GB card: as Table 8, but for who holds the 512 packs of an optimiser step.
#
#   xtuner train configs/gmai_vl/variants/stage1_one_80gb.py --deepspeed zero2
#
# 32 GPUs x 8 x 2 = 1 GPU x 8 x 64. Memory, in GB: frozen weights 8.04 G x 2 bytes = 16.1; the projector
# 0.02 G x 20 = 0.4 (bf16 weights, bf16 gradients, their fp32 sum, fp32 master weights, two Adam moments; x 24
# when they are summed, x 22 at the step, both without activations); DeepSpeed's reduce buckets 0.8;
# activations of 16,384 tokens about 9 (inputs of 32 layers 4.3, one layer recomputed 3, logits of 2,048
# tokens 1.9).
# About 26 of 80 if all layers are recomputed in the backward pass; 25 of 32 keep their activations instead (74 GiB by
# the preflight, 2 of it allowance; 25 % fewer operations). On 141 GB none need be recomputed (88 GiB).
_base_ = ["../stage1_shallow.py"]

model = dict(recomputed_layers=7)
optim_wrapper = dict(accumulative_counts=64)
default_hooks = dict(checkpoint=dict(interval=16))
