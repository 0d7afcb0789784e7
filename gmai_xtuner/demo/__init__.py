# SPDX-License-Identifier: Apache-2.0

"""A page to try a model in a browser: ``python -m gmai_xtuner.demo MODEL [MODEL_B]``.

What is opened (`files`, `medical_files`, `studies`), what is asked (`conversation`), who answers
(`answering`), what is drawn (`boxes`), what is shown (`page`, `image_panel`, `chat_panel`, `widgets`,
`i18n`), and who may come in with how much (`server`, `limits`).
"""
