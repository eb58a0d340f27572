"""Ready-made multimodal data sets, each cut into clients' folders and a hold-out."""
