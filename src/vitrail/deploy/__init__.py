"""Deployment: a classifier as a graph for another runtime."""
