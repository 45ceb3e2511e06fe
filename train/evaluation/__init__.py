"""What a model must beat, and how that is decided: baselines, replicates, folds, audits, scores."""
