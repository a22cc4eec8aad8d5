"""What ends a run: the exchange of signals, in validations too, and who counts as stalled."""

import os
import signal
from types import SimpleNamespace

import pytest

from data.signals import Stopped, handle_signals, note_signals
from trainer.callbacks.preemption import Preemption
from trainer.callbacks.stall_watchdog import Phase, RankState, find_fault, update_state


class Ranks:
    """The strategy of several processes, another of which may have received a signal."""

    def __init__(self, other: bool = False):
        self.other = other
        self.exchanges = 0

    def reduce_boolean_decision(self, decision, all):
        self.exchanges += 1
        return decision or self.other


def make_trainer(world=1, step=0, **more):
    """Return what `Preemption` reads of a trainer."""
    return SimpleNamespace(
        world_size=world, global_step=step, sanity_checking=False, should_stop=False, **more
    )


def test_one_process_stops_at_the_next_step():
    preemption = Preemption(every=10)
    trainer = make_trainer(step=3)
    with handle_signals(ends_process=False):
        note_signals()
        preemption.on_train_batch_end(trainer)
        assert not trainer.should_stop
        os.kill(os.getpid(), signal.SIGUSR1)
        preemption.on_train_batch_end(trainer)
    assert trainer.should_stop and preemption.stopped


def test_several_exchange_every_few_steps():
    ranks = Ranks(other=True)
    preemption = Preemption(every=10)
    for step in range(1, 10):
        preemption.on_train_batch_end(make_trainer(2, step, strategy=ranks))
    assert ranks.exchanges == 0 and not preemption.stopped
    trainer = make_trainer(2, 10, strategy=ranks)
    preemption.on_train_batch_end(trainer)
    assert trainer.should_stop


def test_a_validation_is_broken_off_on_all_ranks():
    preemption = Preemption(every=2)
    trainer = make_trainer(2, 7, strategy=Ranks(other=True))
    preemption.on_validation_batch_end(trainer, None, None, None, 1)
    with pytest.raises(Stopped):
        preemption.on_validation_batch_end(trainer, None, None, None, 2)


def report(beat, evaluated, step=4, phase=Phase.READING):
    """Return the report of a rank, as it stands in the store."""
    return f"{beat} {step} {phase} 0 {evaluated} host a"


def test_a_long_measurement_is_progress():
    state = RankState(changed=0.0)
    assert update_state(state, report(1, 10), 1.0)
    assert not update_state(state, report(2, 10), 2.0)
    assert update_state(state, report(3, 11), 3.0)
    assert state.host == "host a"


def test_the_rank_at_fault_is_behind_in_steps_not_in_evaluations():
    states = [RankState(changed=0.0) for _ in range(2)]
    update_state(states[0], report(1, 10, phase=Phase.BACKWARD), 1.0)
    update_state(states[1], report(1, 99, phase=Phase.FORWARD), 1.0)
    assert "rank 1" in find_fault(states, 0.0)
    assert "rank 0" not in find_fault(states, 0.0)
