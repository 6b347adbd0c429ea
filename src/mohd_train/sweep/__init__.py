"""Sweeps: one short file names many runs; they are expanded, launched, watched and resumed together."""
