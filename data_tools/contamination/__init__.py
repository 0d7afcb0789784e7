# SPDX-License-Identifier: Apache-2.0

"""Benchmarks in a training corpus: found, shown and left out by ``python data_tools/overlap.py``."""
