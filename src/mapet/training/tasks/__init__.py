"""Tasks of the trainer, one a module: model, data, loss, evaluation and product."""
