"""Commands that measure and predict memory and speed; each says what it does with --help."""
