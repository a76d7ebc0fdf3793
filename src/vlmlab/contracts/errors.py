"""The one exception a user may see: a sentence that says what is wrong, where, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the command, the configuration or the data; printed without a traceback.

    The message is one sentence: what is wrong, where (file, row, key), and what to do.
    """


class DataError(UserError):
    """A file or a row of a data set cannot be used; the message names the file and the row or id."""


class CheckpointError(UserError):
    """Saved weights do not fit the composition that wants to load them."""
