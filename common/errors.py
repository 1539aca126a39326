"""The one exception that ends a command with a line for people instead of a traceback."""


class UserError(Exception):
    """Bad input, configuration or environment.

    The message is one line that says what is wrong, where, and what to do. Commands print it and exit with code 2.
    Anything else that escapes is a bug and keeps its traceback. In a run of several processes rank 0 prints it; another
    rank does only if rank 0 does not end with an error of its own.
    """

    exit_code = 2
