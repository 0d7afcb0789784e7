# SPDX-License-Identifier: Apache-2.0

"""What a run will be, and whether it will fail, before a GPU is queued for.

``python -m gmai_xtuner.preflight CONFIG --gpus N``: the model is built on the meta device, the data are
planned as training plans them, and nothing is trained. Token caches and the plan stay, for training.
"""
