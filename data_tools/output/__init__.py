"""Conversations and records -> the corpus folder: files, split, mixture, card, figures, report."""
