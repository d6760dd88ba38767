"""Exact rewritings of a trained model that need less work at inference."""
