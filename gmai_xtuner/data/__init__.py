"""From a mixture file to flat batches. The walk of the data is told in ``docs/architecture.md``."""
