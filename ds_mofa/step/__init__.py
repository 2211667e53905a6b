"""One optimizer step of all matrices: it knows processes and buffers, and no method's maths."""
