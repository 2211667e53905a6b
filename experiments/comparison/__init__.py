"""A comparison of optimizers: one control, one thing varied. ``experiments/compare.py`` is the command.

A YAML becomes runs (:mod:`plan`), each trains a task (:mod:`tasks`) by an optimizer (:mod:`optimizers`) in a process
of its own (:mod:`isolation`, :mod:`training`), leaves a line in a file (:mod:`results`), and the lines become figures
and tables (:mod:`summary`, :mod:`report`).
"""
