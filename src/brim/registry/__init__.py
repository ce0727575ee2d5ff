"""Finds, fetches, describes and converts models, from their headers: weights are never loaded here.

Start at `sources.resolve`, which turns what a user typed into a `ModelSpec`.
"""
