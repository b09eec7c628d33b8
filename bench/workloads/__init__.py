"""What the systems under measurement are given: models, inputs, and the answers that are right."""
