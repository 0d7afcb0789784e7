# SPDX-License-Identifier: Apache-2.0

"""Folders of weights: which layout they have, how they are read, and how a model is exported."""
