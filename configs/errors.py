"""The one exception that is the user's to mend."""


class UserError(Exception):
    """One line: what is wrong, where, and what to do. The command line prints it and exits with 2."""
