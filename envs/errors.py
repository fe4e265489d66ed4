"""The error a user can act on: one sentence with what came, what was wanted and what to do."""


class EnvsError(ValueError):
    """Bad input or a missing package, refused at a door of `diffpolicy_envs`."""
