"""Errors a person sees. Each says what happened and what to do, and carries the exit code of the command."""


class GpusupError(Exception):
    """Base of everything `main` reports without a traceback."""

    exit_code = 125


class UsageError(GpusupError):
    """The command line cannot be carried out as written."""

    exit_code = 2


class PolicyError(UsageError):
    """A policy file is not valid; the message has one `file:line:column: ...` line per problem."""


class NoSuchRun(GpusupError):
    """No run matches what was asked for."""

    exit_code = 3


class JournalError(GpusupError):
    """A journal cannot be trusted: damaged before its last line, or written by a newer version."""


class RunLocked(GpusupError):
    """Another supervisor holds this run."""


class NotExecutable(GpusupError):
    """The trainer's command exists and cannot be executed."""

    exit_code = 126


class CommandNotFound(GpusupError):
    """The trainer's command does not exist."""

    exit_code = 127
