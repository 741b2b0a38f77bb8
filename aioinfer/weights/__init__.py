"""Versioned weights: what serves the next batch, and how it changes between batches."""
