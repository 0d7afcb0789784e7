"""What a training corpus and a benchmark have in common: ``python data_tools/overlap.py``."""
