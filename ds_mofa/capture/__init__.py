"""How a backward fills the sketches: one file for each kind of module whose gradient is taken without forming it."""
