"""The learning rate as numbers: every schedule against its closed form, step by step."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gunn_ext.training import Config, ConfigError, ScheduleConfig, learning_rate, step_learning_rate


def rates(schedule, base, steps_per_epoch, epochs):
    return [learning_rate(schedule, base, t, steps_per_epoch, epochs) for t in range(steps_per_epoch * epochs)]


def test_the_rate_drops_at_epochs_149_and_224_of_300():
    rates = [step_learning_rate(epoch, 300, base=0.1) for epoch in range(300)]
    expected = [0.1] * 149 + [0.01] * 75 + [0.001] * 76
    assert rates == pytest.approx(expected, rel=1e-12)
    assert [e for e in range(1, 300) if rates[e] < rates[e - 1]] == [149, 224]


@given(epochs=st.integers(1, 400), epoch=st.integers(0, 399))
def test_the_rate_follows_the_formula(epochs, epoch):
    if epoch < epochs:
        exponent = (epoch + 1 >= 0.5 * epochs) + (epoch + 1 >= 0.75 * epochs)
        assert step_learning_rate(epoch, epochs, base=0.1) == pytest.approx(0.1 * 10.0**-exponent, rel=1e-12)


def test_other_drops_and_factors():
    rates = [step_learning_rate(e, 4, base=1.0, drops=(1.0,), factor=0.5) for e in range(4)]
    assert rates == [1.0, 1.0, 1.0, 0.5]
    assert step_learning_rate(3, 4, base=0.3, drops=()) == 0.3


@pytest.mark.parametrize("epoch", [-1, 4])
def test_epochs_outside_the_run_are_refused(epoch):
    with pytest.raises(ValueError, match=f"epoch must lie in 0 … 3, got {epoch}"):
        step_learning_rate(epoch, 4, base=0.1)


@pytest.mark.parametrize("step", [-1, 12])
@pytest.mark.parametrize("name", ["step", "cosine", "snapshot"])
def test_steps_outside_the_run_are_refused(name, step):
    with pytest.raises(ValueError, match=f"step must lie in 0 … 11, got {step}"):
        learning_rate(ScheduleConfig(name=name, cycles=2), 0.1, step, 3, 4)


def test_steps_of_an_epoch_share_its_rate():
    found = rates(ScheduleConfig(), 0.1, 5, 4)
    assert found == [step_learning_rate(t // 5, 4, base=0.1) for t in range(20)]


def test_the_imagenet_schedule_ends_with_a_hundredth():
    schedule = ScheduleConfig(milestones=(30, 60, 90), factors=(0.1, 0.1, 0.01))
    assert rates(schedule, 0.1, 2, 120) == pytest.approx([0.1] * 60 + [0.01] * 60 + [1e-3] * 60 + [1e-5] * 60)
    halved = ScheduleConfig(milestones=(1, 3), factor=0.5)
    assert rates(halved, 1.0, 1, 4) == [1.0, 0.5, 0.5, 0.25]


def test_cosine_follows_the_formula_in_every_step():
    found = rates(ScheduleConfig(name="cosine"), 0.3, 7, 3)
    assert found == pytest.approx([0.15 * (1 + math.cos(math.pi * t / 21)) for t in range(21)], rel=1e-12)
    assert found[0] == 0.3


def test_the_warm_up_is_a_line_to_the_rate_that_follows():
    found = rates(ScheduleConfig(name="cosine", warmup_epochs=1.5), 0.8, 4, 4)
    assert found[:7] == pytest.approx([0.8 * (t + 1) / 7 for t in range(7)], rel=1e-12)
    assert found[6:] == pytest.approx([0.4 * (1 + math.cos(math.pi * t / 10)) for t in range(10)], rel=1e-12)
    found = rates(ScheduleConfig(warmup_epochs=1.0), 0.8, 2, 4)
    assert found == pytest.approx([0.8 / 3, 1.6 / 3, 0.08, 0.08, 0.008, 0.008, 0.008, 0.008], rel=1e-12)


def test_snapshot_restarts_its_cosine_in_every_cycle():
    found = rates(ScheduleConfig(name="snapshot", cycles=6), 0.1, 5, 12)
    cycle = [0.05 * (1 + math.cos(math.pi * t / 10)) for t in range(10)]  # Huang et al. 2017a, equation 2, t from 0
    assert found == pytest.approx(cycle * 6, rel=1e-12)
    assert [t for t in range(60) if found[t] == 0.1] == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ScheduleConfig(name="cosin"), "schedule.name must be one of step, cosine, snapshot, got 'cosin'."),
        (lambda: ScheduleConfig(milestones=(3, 2)), "schedule.milestones must rise, got [3, 2]."),
        (lambda: ScheduleConfig(milestones=(0,)), "schedule.milestones must be at least 1, got 0."),
        (
            lambda: ScheduleConfig(milestones=(3,), factors=(0.1, 0.1)),
            "schedule.factors needs one number for each of schedule.milestones, got [0.1, 0.1] for [3].",
        ),
        (lambda: ScheduleConfig(milestones=(1,), factors=(2.0,)), "schedule.factors must be a finite number above 0"),
        (lambda: ScheduleConfig(cycles=0), "schedule.cycles must be at least 1, got 0."),
        (
            lambda: Config(epochs=3, schedule=ScheduleConfig(warmup_epochs=3.0)),
            "schedule.warmup_epochs (3.0) must be less than epochs (3).",
        ),
        (
            lambda: Config(epochs=16, schedule=ScheduleConfig(name="snapshot")),
            "epochs (16) must be divisible by schedule.cycles (6), so that a cycle ends with an epoch; 12 epochs are.",
        ),
        (
            lambda: Config(epochs=12, schedule=ScheduleConfig(name="snapshot", warmup_epochs=1.0)),
            "schedule.warmup_epochs must be 0 with schedule.name=snapshot",
        ),
    ],
)
def test_impossible_schedules_are_refused_by_name(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(message)
