"""Studies of the gradients and the momentum of a training. ``experiments/study.py`` is the command.

A trainer moves the model and is only looked at (:mod:`trajectory`), or a sequence of gradients is made up
(:mod:`synthetic`). Every way of keeping a momentum sees the same gradients (:mod:`projections`, :mod:`energies`). What
is measured (:mod:`projection`, :mod:`spectrum`, :mod:`updates`) becomes JSON, Markdown and
figures (:mod:`pages`, :mod:`figures`).
"""
