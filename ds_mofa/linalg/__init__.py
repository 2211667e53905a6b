"""Pure functions on batches of matrices: the mathematics of the methods."""
