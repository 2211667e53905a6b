"""Thin adapters between the step and an engine that holds the weights."""
