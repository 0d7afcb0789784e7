# SPDX-License-Identifier: Apache-2.0

"""The shared ground of both products: everything that needs no torch."""
