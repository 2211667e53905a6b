"""Comparisons of optimizers, studies of gradients, and the baselines: run from a checkout, not part of the package.

compare.py, comparison/   one task, several optimizers, a grid for each, several seeds
study.py, studies/        what a projection of the gradient loses, how low-rank the momentum is
baselines/                the optimizers that MoFaSGD is compared with, and its laboratory
configs/, results/        the YAMLs of both commands, and what they have written

This folder imports ``ds_mofa`` and what of ``launch`` reads data; neither imports it.
"""
