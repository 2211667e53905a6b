"""Who owns which matrix, where its numbers lie in the flat buffers, and the collectives."""
