"""``python -m ds_mofa``, which is ``ds-mofa``: see :mod:`ds_mofa.commands`."""

from ds_mofa.commands import main

if __name__ == "__main__":
    main()
