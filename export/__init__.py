"""From a model and a schedule to a bundle, and from trained parameters to the final model."""
