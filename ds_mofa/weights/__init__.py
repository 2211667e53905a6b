"""Writing an update into the weights, wherever and however they lie."""
