"""What several folders of tests share: models, checkpoints, documents, a pretended GPU."""
