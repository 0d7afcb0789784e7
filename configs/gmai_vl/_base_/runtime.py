# SPDX-License-Identifier: Apache-2.0

# Log every 10 micro-batches, to the console, vis_data/scalars.json and TensorBoard. The other intervals count
# optimiser steps.

custom_imports = dict(imports=["gmai_xtuner.plugin"], allow_failed_imports=False)

default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", log_metric_by_epoch=False, interval=10),
    param_scheduler=dict(type="OptimizerStepScheduleHook"),
    checkpoint=dict(type="StepCheckpointHook", by_epoch=False, interval=125, max_keep_ckpts=2),
    # keep=True keeps the checkpoint of the best validation in work_dir/best; patience=3 ends the run after three
    # validations without a better one.
    best=dict(type="BestCheckpointHook", monitor="val/loss", keep=False, patience=None),
    # A step with a NaN is skipped; more than these stop the run with a checkpoint.
    nonfinite=dict(type="NonFiniteHook", max_in_a_row=3, max_total=20),
    sample_answer=dict(type="SampleAnswerHook", interval=125, count=1, max_new_tokens=64),
    sampler_seed=None,  # the data plan has its own seed and epochs
)

custom_hooks = [dict(type="ProgressHook")]

visualizer = dict(
    type="Visualizer",
    vis_backends=[
        dict(type="LocalVisBackend"),
        dict(type="TensorboardVisBackend"),
    ],
)

# Losses and gradient norms are means already.
log_processor = dict(by_epoch=False, mean_pattern=r".*time.*")

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    # gloo where there is no GPU, see gmai_xtuner.compat. All ranks wait for a checkpoint to be on disk: an
    # hour (in seconds).
    dist_cfg=dict(backend="nccl", timeout=3600),
)

randomness = dict(seed=0, deterministic=False)
log_level = "INFO"
load_from = None
resume = False
