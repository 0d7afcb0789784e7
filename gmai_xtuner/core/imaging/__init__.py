# SPDX-License-Identifier: Apache-2.0

"""Images, volumes and windows, as training, the corpus builder and the page read them."""
