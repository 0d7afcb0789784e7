"""The shared ground of both products: everything that needs no torch."""
