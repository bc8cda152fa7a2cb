"""Each kind of bug is found by the tool that is meant to find it, with its line; without the bug all is well.

A planted case runs after its mended twin in the same process: stacks and barriers in their second life find it too.
"""

import re

import pytest

WRONG, SANITIZED, ERROR = (1,), (1, 66), (3,)

RACES = (
    "missing_barrier",
    "missing_barrier_before_reuse",
    "missing_warp_barrier",
    "update_across_blocks",
    "missing_grid_barrier",
    "missing_cluster_barrier",
    "relaxed_flag",
    "copy_into_a_buffer_in_use",
)
OVERRUNS = {
    "dynamic_shared_overrun": "heap-buffer-overflow",
    "static_shared_overrun": "heap-buffer-overflow",
    "global_overrun": "heap-buffer-overflow",
    "copy_overrun": "heap-buffer-overflow",
    "misaligned_vector": "misaligned address",
}
NOT_A_NUMBER = ("uninitialised_shared", "missing_copy_wait")
REPORTS = {
    "barrier_in_a_branch": r"deadlock.*threads 0–15 \(16\): wait at __syncthreads \(bugs.cu:\d+\)",
    "two_barriers_for_one": r"block \(0, 0, 0\), thread 1: divergent barriers: .*bugs.cu:\d+",
    "block_leaves_the_grid": r"deadlock.*block \(2, 0, 0\), threads 0–63 \(64\): ended",
    "a_block_too_few": r"deadlock.*block \(3, 0, 0\), thread 0: poll for all blocks \(bugs.cu:\d+\)",
    "wait_without_cooperation": r"deadlock.*thread 0: poll for block 1.*only in a cooperative launch",
    "grid_barrier_without_cooperation": r"not cooperative: set Launch::cooperative",
    "shuffle_from_outside_the_mask": r"thread 5: __shfl_sync .* reads lane 20, .* outside its mask 0x0000ffff",
    "shuffle_without_being_in_the_mask": r"thread 16: __shfl_xor_sync .* leaves out its own lane 16",
    "shuffle_from_a_lane_that_left": r"thread 56: __shfl_xor_sync .* reads lane 8, .* has ended",
    "lanes_call_different_functions": r"__shfl_sync .* while thread 0 of its warp waits at __syncwarp",
    "mma_in_half_a_warp": r"mma .* needs all 32 lanes, only 0xfffffff7 take part",
    "uninitialised_shared_checked": r"check_initialised .* element 3 of 64 was never written",
    "remote_shared_too_early": r"remote_shared .* before any cluster_barrier",
}
LAUNCHES = {
    "too_many_threads": r"block \(33, 32, 1\) must lie between .* at most 1024",
    "too_much_shared_memory": r"300000 bytes of dynamic .*\n.*layer \(2, 240, 32, 32\), segments 20",
    "empty_grid": r"grid \(0, 1, 1\) must lie between",
}


def assert_found(result, name, codes, pattern):
    assert result.returncode in codes, result.stdout + result.stderr
    assert re.search(pattern, result.stderr, re.DOTALL), result.stderr
    if codes == ERROR:
        assert result.stderr.startswith(f"{name}: {name}: ")
        assert "grid (" in result.stderr


def run(emulated, flavour, name, **settings):
    return emulated.run("bugs", flavour, f"{name}_mended", name, **settings)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("name", RACES)
def test_races(emulated, name, seed):
    settings = {} if seed is None else {"seed": seed}
    assert_found(run(emulated, "thread", name, **settings), name, SANITIZED, r"data race.*bugs\.cu:\d+")


@pytest.mark.parametrize("name", RACES)
def test_races_hide_from_values(emulated, name):
    """Why ThreadSanitizer is there: without it these programs end well."""
    assert run(emulated, "plain", name).returncode == 0


@pytest.mark.parametrize(("name", "pattern"), OVERRUNS.items())
def test_overruns(emulated, name, pattern):
    assert_found(run(emulated, "address", name), name, SANITIZED, pattern + r".*bugs\.cu|bugs\.cu.*" + pattern)


def test_remote_shared_memory_of_a_block_that_ended(emulated):
    """A pointer kept too long is a use after free; one asked for too late is refused."""
    result = run(emulated, "address", "remote_shared_too_late")
    assert_found(result, "remote_shared_too_late", SANITIZED + ERROR, r"use-after-free|has ended")


@pytest.mark.parametrize("name", NOT_A_NUMBER)
def test_values_that_were_never_there_are_nan(emulated, name):
    assert_found(run(emulated, "plain", name), name, WRONG, r"y\[\d+\] is NaN")


@pytest.mark.parametrize("flavour", ["plain", "address", "thread"])
@pytest.mark.parametrize(("name", "pattern"), REPORTS.items())
def test_reports(emulated, name, pattern, flavour):
    assert_found(run(emulated, flavour, name), name, ERROR, pattern)


@pytest.mark.parametrize(("name", "pattern"), LAUNCHES.items())
def test_launches_no_gpu_would_take(emulated, name, pattern):
    assert_found(emulated.run("bugs", "plain", name), name, ERROR, pattern)


@pytest.mark.parametrize("flavour", ["plain", "address", "thread"])
@pytest.mark.parametrize("settings", [{}, {"seed": 6}], ids=str)
def test_mended_kernels_are_clean(emulated, flavour, settings):
    mended = [case for case in emulated.cases("bugs", flavour) if case.endswith("_mended")]
    assert len(mended) == len(RACES) + len(OVERRUNS) + len(NOT_A_NUMBER) + len(REPORTS) + 1
    result = emulated.run("bugs", flavour, *mended, **settings)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
