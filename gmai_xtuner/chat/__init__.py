"""Talk to a trained model in the terminal: ``python -m gmai_xtuner.chat MODEL --image X``."""
