# SPDX-License-Identifier: Apache-2.0

"""Conversations and records -> the corpus folder: files, split, mixture, card, figures, report."""
