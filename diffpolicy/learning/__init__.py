"""What agents share: the models that learn, how they descend, critics; an agent adds what is its paper's."""
