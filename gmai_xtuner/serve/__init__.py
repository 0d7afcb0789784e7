# SPDX-License-Identifier: Apache-2.0

"""Serve a trained model by the OpenAI API: ``python -m gmai_xtuner.serve MODEL``.

Images are read as in training, 16-bit files included, which no general engine does. One request is computed
at a time, the others wait: for many users at once see docs/serving.md.
"""
