"""What trains everything that is no matrix."""
