"""A page to try a model in a browser: ``python -m gmai_xtuner.demo MODEL [MODEL_B]``.

What is opened (`files`, `dicom`, `nifti`, `studies`, `windows`), what is asked (`presets`, `conversation`),
who answers (`answering`), what is drawn and saved (`boxes`, `saving`), what is shown (`page`,
`image_panel`, `chat_panel`, `words`), and who may come in with how much (`limits`, `guard`, `server`).
"""
