"""What is wrong with something the user gave."""


class InputError(ValueError):
    """A file, a name or an option that cannot be used: one sentence with where, what was found and what to do."""
