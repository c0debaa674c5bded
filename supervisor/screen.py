"""The one screen before the first attempt: what was found and where, the ladder, and what cannot be done."""

from .core.events import Finished, RemediationChosen, RemediationSkipped, RunCreated
from .core.ladder import describe_changes, show
from .core.policy import ACCUMULATION, MICRO_BATCH
from .core.unfold import unfold
from .preflight import Prepared, worst_case_loss
from .units import format_bytes


def screen(run: RunCreated, prepared: Prepared) -> str:
    """The text, ending in a newline."""
    lines = [
        f"gpusup  run {run.run_id} ({run.name})   policy {run.policy_name}, {len(run.policy.remediations)} remediations"
        f"   trainer {run.dialect}" + ("   OBSERVING: nothing will be changed" if run.observe else ""),
        _memory(run),
        *_settings(run),
        _global_batch(run),
        *_checkpoints(run),
        *_ladder(run),
        *_restore(run),
        *(f"  note        {note}" for note in prepared.notes),
        *(f"  warning     {warning}" for warning in prepared.reading.warnings),
        f"  follow      gpusup log -f {run.run_id}     take over after a crash of gpusup   gpusup resume {run.run_id}",
    ]
    return "\n".join(lines) + "\n"


def _memory(run: RunCreated) -> str:
    where = f"GPU {run.gpu_name or '(not seen by NVML)'}" if run.trains_on == "gpu" else "the host (no GPU in use)"
    budget = f", with a real limit of {format_bytes(run.memory_budget_bytes)}" if run.memory_budget_bytes else ""
    return f"  memory      {where}{budget}"


def _settings(run: RunCreated) -> list[str]:
    lines = []
    for knob, origin in run.origins.items():
        if origin.value is not None:
            lines.append(f"  {knob:<28} {show(origin.value):<12} {origin.where}")
        else:
            lines.append(f"  {knob:<28} {'unknown':<12} {origin.where}  {origin.why_unknown}".rstrip())
    return lines


def _global_batch(run: RunCreated) -> str:
    if run.global_batch_size is None:
        return (
            "  global batch  unknown: the micro-batch will not be changed, because the global batch could not be held"
        )
    product = f"{run.settings.get(MICRO_BATCH)} x {run.settings.get(ACCUMULATION)}"
    return f"  global batch  {run.global_batch_size} samples ({product}), held exactly"


def _checkpoints(run: RunCreated) -> list[str]:
    plan = run.checkpoints
    lines = [f"  checkpoints  {plan.place or 'none known'}; worst case a restart loses {worst_case_loss(plan)}"]
    if not plan.place:
        lines.append("  warning     no way to resume is known: a restart begins at step 0")
    elif plan.every_steps and not plan.can_save_on_request:
        lines.append(
            f"  warning     no checkpoint exists before step {plan.every_steps}: an earlier restart begins at step 0. "
            "`--checkpoint-every N` would change that"
        )
    if plan.replays_data:
        lines.append(
            "  warning     it does not save its position in the data: each resume trains on the first batches again"
        )
    return lines


def _ladder(run: RunCreated) -> list[str]:
    lines, number, batches = [], 0, []
    for step in unfold(run):
        if isinstance(step, RemediationChosen) and step.lever == "micro_batch":
            batches.append(step)
            continue
        if isinstance(step, RemediationChosen):
            if step.wait_for_memory_s is None:
                number += 1
                lines.append(f"  on OOM {number}    {step.name}: {describe_changes(step.changes)} [{step.consent}]")
        elif isinstance(step, RemediationSkipped) and not batches:
            lines.append(f"  skipped     {step.name}: {step.because}")
        elif isinstance(step, Finished) and batches:
            lines.append(_micro_batches(number + 1, batches))
            batches = []
    return lines or ["  on OOM      nothing: the policy has no remediation that applies here"]


def _micro_batches(number: int, steps: list[RemediationChosen]) -> str:
    chain = [f"{c[MICRO_BATCH].after}x{c[ACCUMULATION].after}" for c in (step.changes for step in steps)]
    shown = chain if len(chain) <= 8 else [*chain[:6], "...", chain[-1]]
    return f"  on OOM {number}    {steps[0].name}: {' -> '.join(shown)} [{steps[0].consent}]"


def _restore(run: RunCreated) -> list[str]:
    restore = run.policy.restore
    if restore is None:
        return ["  going up    never: the policy has no `restore`"]
    order = ", then ".join(restore.order)
    return [f"  going up    after {restore.after_steps} stable steps: {order}; one at a time, at a checkpoint"]
