"""Frameworks that want a class of their own kind; each module imports its framework, and nothing here imports the modules."""
