"""Training: sample plan, stream, tokens, model, loop, launch, checkpoint, predictor."""
