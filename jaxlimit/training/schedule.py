"""Learning rates that count epochs, as optax schedules over updates."""

from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

import optax

from jaxlimit.core.checks import require_count, require_range

Schedule = Literal["constant", "cosine", "steps"]
SCHEDULES = get_args(Schedule)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Number of updates `train` makes in an epoch: ceil(num_examples / batch_size).

    Args:
        num_examples: number of training examples, 1 or more.
        batch_size: examples per update, 1 or more.

    Returns:
        The number of batches, an uneven last one included.

    Raises:
        ValueError: if an argument is not an integer of at least 1.

    Examples:
        A cosine from 0.05 to 0 over 400 epochs:

        >>> schedule = optax.cosine_decay_schedule(0.05, 400 * steps_per_epoch(1438, 128))
        >>> round(float(schedule(200 * 12)), 6)
        0.025
    """
    require_count("num_examples", num_examples)
    require_count("batch_size", batch_size)
    return -(-num_examples // batch_size)


def learning_rate_schedule(
    kind: Schedule,
    learning_rate: float,
    *,
    epochs: int,
    updates_per_epoch: int,
    warmup_epochs: int = 0,
    milestones: Sequence[float] = (),
    factor: float = 0.5,
) -> float | optax.Schedule:
    """A schedule that counts epochs, as a schedule over updates.

    Args:
        kind: "constant"; "cosine", which goes to 0 over all updates; or "steps".
        learning_rate: after the warm-up.
        epochs: of the training, the warm-up included.
        updates_per_epoch: see `steps_per_epoch`.
        warmup_epochs: in which the rate grows linearly from 0.
        milestones: of "steps": after these shares of the epochs, rounded to whole epochs (but at least one,
            for a share above 0), the rate is multiplied by `factor`; in the warm-up only at its end.
        factor: of "steps".

    Returns:
        What `train` takes: a number, or an optax schedule.

    Raises:
        ValueError: another kind.

    Examples:
        A tenth after 80 and again after 120 of 160 epochs:

        >>> rate = learning_rate_schedule(
        ...     "steps", 0.1, epochs=160, updates_per_epoch=10, milestones=(0.5, 0.75), factor=0.1
        ... )
        >>> [round(float(rate(step)), 6) for step in (0, 799, 800, 1199, 1200)]
        [0.1, 0.1, 0.01, 0.01, 0.001]
    """
    require_range("schedule", kind, kind in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
    warmup, updates = warmup_epochs * updates_per_epoch, epochs * updates_per_epoch
    if kind == "constant" and not warmup:
        return learning_rate
    schedule = optax.constant_schedule(learning_rate)
    if kind == "cosine":
        schedule = optax.cosine_decay_schedule(learning_rate, max(1, updates - warmup))
    elif kind == "steps":
        ends = [max(share > 0, round(share * epochs)) for share in milestones]
        passed = Counter(end * updates_per_epoch - warmup for end in ends)
        steps = {step: factor**times for step, times in passed.items()}
        schedule = optax.piecewise_constant_schedule(learning_rate, steps)
    if not warmup:
        return schedule
    growing = optax.linear_schedule(0.0, learning_rate, warmup)
    return optax.join_schedules([growing, schedule], [warmup])
