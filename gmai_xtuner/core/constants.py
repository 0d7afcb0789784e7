# SPDX-License-Identifier: Apache-2.0

"""The few ids and marks that data, model and export must agree on (values of xtuner 0.2.0)."""

from __future__ import annotations

IMAGE_TOKEN = "<image>"
"""Mark of an image in the text of a user turn."""

IMAGE_TOKEN_INDEX = -200
"""Placeholder of an image feature in ``input_ids``; never reaches the embedding table."""

IGNORE_INDEX = -100
"""Label of a token that is not supervised."""

DATA_URL = "data:;base64,"
"""Begins a name that is an image itself, in the alphabet of base64 for URLs: it has no slash."""
