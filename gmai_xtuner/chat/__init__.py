# SPDX-License-Identifier: Apache-2.0

"""Talk to a trained model in the terminal: ``python -m gmai_xtuner.chat MODEL --image X``."""
