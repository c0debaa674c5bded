"""gpusup's reference trainer: a GPT-2 pretrainer that resumes exactly and says what it is doing.

It imports nothing from the supervisor. What the two agree on is in docs/trainer-protocol.md: the environment, one
file of events and one signal.
"""
