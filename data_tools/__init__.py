# SPDX-License-Identifier: Apache-2.0

"""From labelled medical image sets to an image-text corpus; ``python data_tools/generate.py JOB.yaml``.

Imports nothing that needs torch, and of ``gmai_xtuner`` only ``core``.
"""
