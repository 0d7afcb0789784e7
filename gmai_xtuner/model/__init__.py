# SPDX-License-Identifier: Apache-2.0

"""The model: flat batch in, loss out. Nothing here reads or writes a checkpoint."""
