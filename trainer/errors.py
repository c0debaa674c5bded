"""The one exception whose message is meant for the person at the keyboard."""


class TrainerError(Exception):
    """Something the user can put right: the message says what happened, where, and what to do about it."""
