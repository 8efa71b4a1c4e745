"""Training of models. No serving code imports this package."""
