# SPDX-License-Identifier: Apache-2.0

# Stage 2 on one 24 GB card: as Table 8, but for who holds the 512 packs of an optimiser step. The optimiser
# is in the machine's memory, so that the language model fits in bf16; it steps once in 256 micro-batches.
#
#   xtuner train configs/gmai_vl/variants/stage2_one_24gb.py --deepspeed zero2_offload
#
# 32 GPUs x 4 x 4 = 1 GPU x 2 x 256. Memory, in GB: frozen language model 7.74 G x 2 bytes = 15.5; tower and
# projector 0.32 G x 4 = 1.3 (bf16 weights and gradients); reduce buckets 0.8; activations of 4,096 tokens
# about 3. About 21; the preflight counts 17.6 GiB, without its allowance. In the machine's memory 0.32 G x 20 =
# 6.5, beside what loading takes.
_base_ = ["../stage2_deep.py"]

model = dict(
    loss_chunk_size=512,
    pretrained_pth="{{$GMAI_STAGE1:work_dirs/stage1_one_24gb}}",
)
train_dataloader = dict(batch_size=2)
optim_wrapper = dict(accumulative_counts=256)
default_hooks = dict(checkpoint=dict(interval=4))
