# SPDX-License-Identifier: Apache-2.0

"""What runs around the model: start, loop, learning rate, checkpoints, what the log shows."""
