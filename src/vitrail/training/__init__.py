"""Training: `train` (run.py), and what it is made of."""
