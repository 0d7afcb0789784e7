# SPDX-License-Identifier: Apache-2.0

"""From a mixture file to flat batches. The walk of the data is described in ``docs/architecture.md``."""
