"""The update rules that run on the shared step: each the maths of one optimizer, and what its owners keep."""
