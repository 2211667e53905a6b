"""``python -m ds_mofa.profiler.report``, which is ``ds-mofa report``: see :mod:`ds_mofa.profiler.report.command`."""

from ds_mofa.profiler.report.command import main

if __name__ == "__main__":
    main()
