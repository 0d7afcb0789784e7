# SPDX-License-Identifier: Apache-2.0

"""A page to try a model in a browser: ``python -m gmai_xtuner.demo MODEL [MODEL_B]``.

What is opened and with how much memory (`files`, `studies`), what is asked and who answers
(`conversation`), what is drawn (`boxes`), what is shown (`image_panel`, `chat_panel`, `widgets`, `i18n`), and
the page itself and who may come in (`server`).
"""
