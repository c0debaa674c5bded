"""The supervisor: launches a trainer, diagnoses its failures, remediates, resumes and restores. Never imports torch."""

__version__ = "0.1.0"
