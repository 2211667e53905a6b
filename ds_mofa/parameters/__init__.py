"""Which parameter goes where: the matrices to MoFaSGD, the rest to AdamW, and the table that says so."""

from ds_mofa.parameters.shapes import is_sharded, local_part
from ds_mofa.parameters.split import Frozen, Leftover, Matrix, Split, full_shape, split_parameters

__all__ = ["Frozen", "Leftover", "Matrix", "Split", "split_parameters", "full_shape", "is_sharded", "local_part"]
