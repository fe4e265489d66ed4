"""What agents share: the models that learn, their losses and optimizers; an agent adds its own losses."""
