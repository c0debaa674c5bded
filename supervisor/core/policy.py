"""The policy, typed: which remediations in which order, what is given back and when, and the limits.

Reading it from YAML is `gpusup.supervisor.policy_file`; the meaning of every key is in docs/policy.md.
"""

from typing import Literal

from msgspec import Struct

Scalar = bool | int | float | str
Settings = dict[str, Scalar]
"""Knob -> value. A knob whose value could not be read is absent: unknown is never guessed."""

MICRO_BATCH = "batch_size"
ACCUMULATION = "gradient_accumulation_steps"

KNOBS: dict[str, tuple[type, ...]] = {
    "compile": (bool,),
    "dtype": (str,),
    "batch_size": (int,),
    "gradient_accumulation_steps": (int,),
    "block_size": (int,),
}
"""Every knob a policy may name, with the types its value may have."""

SETTABLE = ("compile", "dtype")
"""Knobs a `set` remediation may change. The micro-batch moves by `step`, which holds the global batch."""

DTYPES = ("float32", "bfloat16", "float16")

LEVERS = ("compile", "dtype", "micro_batch")
"""What `restore.order` may name: a knob that `set` changed, or the micro-batch with its accumulation."""

ConsentClass = Literal["same math", "numerics", "changes the experiment"]

CONSENT: dict[str, ConsentClass] = {
    "micro_batch": "same math",
    "wait_for_memory": "same math",
    "compile": "numerics",
    "dtype": "numerics",
}


class Remediation(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One rung of the ladder. Exactly one of `set`, `step` and `wait_for_memory_s` is given.

    `when` restricts the rung to settings with these values. `undo_if_useless` takes the change back at the next start
    when the very same request failed again in the same phase.
    """

    name: str
    set: Settings | None = None
    step: Literal["micro_batch"] | None = None
    min: int = 1
    wait_for_memory_s: float | None = None
    when: Settings = {}
    undo_if_useless: bool = True

    @property
    def lever(self) -> str:
        """What it moves: `micro_batch`, `wait_for_memory`, or the knobs it sets."""
        if self.step is not None:
            return self.step
        return "wait_for_memory" if self.set is None else "+".join(self.set)

    @property
    def consent(self) -> ConsentClass:
        """The class of change, the most far-reaching of its knobs."""
        classes = {CONSENT[lever] for lever in self.lever.split("+")}
        ranked: tuple[ConsentClass, ...] = ("changes the experiment", "numerics", "same math")
        return next(c for c in ranked if c in classes)


class Restore(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Going back up: one lever at a time after `after_steps` stable optimizer steps, at a checkpoint, on probation for
    as many again. A failed try multiplies that lever's wait by `backoff`. `retry_failed` also tries combinations that
    ran out of memory in this run."""

    after_steps: int = 100
    order: tuple[str, ...] = ("compile", "micro_batch", "dtype")
    backoff: float = 2.0
    max_tries: int = 3
    retry_failed: bool = False


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where it ends. `grace_s` is how long a trainer has to save and leave when asked; `hang_after_s`, how long one
    whose steps are counted may make none (or 20 times what its slowest took) until it is taken to hang; 0: for ever."""

    max_attempts: int = 24
    grace_s: float = 60.0
    hang_after_s: float = 1800.0


class Policy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A whole policy file, version 1."""

    version: Literal[1] = 1
    description: str = ""
    remediations: tuple[Remediation, ...] = ()
    restore: Restore | None = None
    limits: Limits = Limits()
    checkpoint_every: int | None = None
    memory_budget_bytes: int | None = None
