"""Checkpoints answered over HTTP: embeddings of cells, effects of perturbations."""
