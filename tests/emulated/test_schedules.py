"""A seed shuffles the schedule: it changes what depends on the order of threads, and nothing else."""

SEEDS = range(1, 9)


def bits(emulated, case, **settings):
    result = emulated.run("order", "plain", case, **settings)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_fixed_order_gives_the_same_bits_under_every_schedule(emulated):
    expected = bits(emulated, "fixed_order")
    assert {bits(emulated, "fixed_order", seed=seed, workers=1 + seed % 2) for seed in SEEDS} == {expected}


def test_seeds_change_the_schedule_and_repeat_it(emulated):
    assert len({bits(emulated, "any_order", seed=seed) for seed in SEEDS}) > 3
    assert all(bits(emulated, "any_order", seed=seed) == bits(emulated, "any_order", seed=seed) for seed in (1, 2))


def test_settings_must_be_numbers(emulated):
    result = emulated.run("order", "plain", "any_order", seed="dice")
    assert result.returncode == 3
    assert "GUNN_EMULATOR_SEED=dice: expected a number" in result.stderr
