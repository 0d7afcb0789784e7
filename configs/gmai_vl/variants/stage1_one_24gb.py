# SPDX-License-Identifier: Apache-2.0

# Stage 1 on one 24 GB card: as Table 8, but for who holds the 512 packs of an optimiser step.
#
#   xtuner train configs/gmai_vl/variants/stage1_one_24gb.py --deepspeed zero2
#
# 32 GPUs x 8 x 2 = 1 GPU x 2 x 256. Memory, in GB: frozen weights 8.04 G x 2 bytes = 16.1; the projector
# 0.02 G x 20 = 0.4 (see stage1_one_80gb.py); reduce buckets 0.8; activations of 4,096 tokens about 2.5
# (inputs of 32 layers 1.1, one layer recomputed 0.8, logits of 512 tokens 0.5). About 19.8; the
# preflight counts 18.1 GiB, without its allowance, of the 22.5 to 24 that such cards have.
_base_ = ["../stage1_shallow.py"]

model = dict(loss_chunk_size=512)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(accumulative_counts=256)
default_hooks = dict(checkpoint=dict(interval=4))
