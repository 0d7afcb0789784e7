# SPDX-License-Identifier: Apache-2.0

# The mixture, soft-packed. GMAI_MIXTURE and GMAI_CACHE in the environment name the mixture file and the
# folder for token caches and packing plans. Tokenizer and vision tower are the model's.

train_dataloader = dict(
    num_workers=4,
    persistent_workers=True,
    dataset=dict(
        type="SoftPackedDataset",
        mixture="{{$GMAI_MIXTURE:{{ fileDirname }}/../mixtures/gmai_vl_5_5m.yaml}}",
        cache_dir="{{$GMAI_CACHE:work_dirs/cache}}",
        prompt_template="internlm2_chat",
        max_length=2048,
        max_images=16,
        image_mode="pad",  # "resize" for a plain resize without padding
        image_decoding="full",  # "scaled" decodes large JPEG files at a fraction of their size
        seed=0,
        on_bad_sample="raise",  # "skip" leaves bad samples out, counts them and writes their ids
        check_images="header",
        held_out=0.001,  # share of the images that is validated on and not trained on; 0: no validation
    ),
    sampler=dict(type="PackSampler"),
    batch_sampler=dict(type="MicroBatchSampler", weighting="token"),
    collate_fn=dict(type="collate_packs"),
)

# The loss on what train_dataloader holds out; no dataset of its own to keep in step.
val_dataloader = dict(
    batch_size=4,
    num_workers=2,
    sampler=dict(type="PackSampler"),
    batch_sampler=dict(type="MicroBatchSampler"),
    collate_fn=dict(type="collate_packs"),
)
# at_most: conversations of each dataset. benchmarks: a folder of them, or name -> dict(data=..., protocol=...,
# limit=...), asked every benchmark_interval optimiser steps (None: at every validation); docs/evaluation.md.
val_cfg = dict(type="HeldOutLoop", at_most=100, benchmarks=dict(), benchmark_interval=None)
val_evaluator = dict(type="HeldOutLoss", by="category")

# xtuner test CONFIG --checkpoint CHECKPOINT: every benchmark in the folder that GMAI_BENCHMARKS names.
test_dataloader = dict(
    batch_size=8,
    num_workers=2,
    dataset=dict(type="BenchmarkQuestions", benchmarks="{{$GMAI_BENCHMARKS:data/benchmarks}}"),
)
test_cfg = dict(type="BenchmarkLoop")
test_evaluator = dict(type="BenchmarkScore")
