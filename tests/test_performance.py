"""The performance model: against counts by hand, and what must hold whatever its constants are."""

from dataclasses import replace

import pytest

from gunn_ext.analysis.cost import layer_flops
from gunn_ext.analysis.performance import (
    BYTES,
    FAST_LIBRARY,
    H200,
    SLOW_LIBRARY,
    DeviceLimits,
    LayerSizes,
    Parts,
    cpu_limits,
    fused,
    persistent,
    simultaneous,
    staged,
)
from gunn_ext.bench.cases import LAYERS, build
from gunn_ext.layers import GunnLayer

VARIANTS = (staged, persistent, simultaneous, fused)
# A device of round numbers: 10 FLOP/s usable, 1 byte/s from memory, 4 from a cache that holds everything.
ROUND = DeviceLimits(
    name="round",
    peak_flops={"float32": 20.0},
    memory_bandwidth=1.0,
    cache_bandwidth=4.0,
    cache_bytes=1e9,
    shared_bandwidth=1e9,
    exchange=100.0,
    launch=1000.0,
    processors=1,
    flop_share=0.5,
)
# s = 2, k = 2: per pixel and segment, multiply-adds 2 * 4 (reduce) + 9 * 2 * 2 (spatial) + 2 * 2 (project) = 48.
TINY = LayerSizes(channels=4, segments=2, size=8, expansion=1)
PIXELS = 64
FLOPS = 2 * PIXELS * 2 * 48
STATE = PIXELS * 4 * 4  # bytes


@pytest.mark.parametrize("sizes", LAYERS.values(), ids=LAYERS)
def test_flops_are_those_of_the_layer(sizes):
    layer = build(GunnLayer, sizes, device="meta")
    assert sizes.flops(3) == 3 * layer_flops(layer, sizes.size, sizes.size)


def test_the_tiny_layer_by_hand_on_the_persistent_driver():
    found = persistent(TINY, 1, "float32", ROUND)
    # 10 FLOP/s; x and y at 1 byte/s; two launches. All of the state stays on the chip.
    weights = 2 * 48 * 4  # read by the one block from the cache: hidden under the products
    assert weights / ROUND.cache_bandwidth < FLOPS / 10
    assert found.evaluation == Parts(compute=FLOPS / 10, memory=2 * STATE, launch=2000.0)
    assert found.forward == found.evaluation + Parts(exchange=3 * 2 * 100.0)
    assert found.backward.compute == pytest.approx(3 * FLOPS / 10)
    assert found.backward.exchange == 3 * 2 * 100.0
    # One block of segments: recomputed, its chain, two products, their sums, beside what begins a pass.
    assert found.backward.launch == (1 + 1 + 4) * 1000.0
    kept = 2 * (2 * 2 + 2 * 2) * PIXELS * 4  # k and s twice, of two segments
    # g read and written, the state read to recompute; pre-activations written, read, read by half; gradients of them
    # written and read.
    assert found.backward.memory == 3 * STATE + (2.5 + 2) * kept


def test_the_tiny_layer_by_hand_on_the_staged_driver():
    found = staged(TINY, 1, "float32", ROUND)
    # Values a pixel and segment: reduce 4 + 2, spatial 2 + 2, project 2 + 2, write-back 4 * 2.
    moved = 2 * PIXELS * 4 * (6 + 4 + 4 + 8)
    moved += 2 * 48 * 4  # weights, once for the one tile of pixels
    assert found.evaluation.compute == pytest.approx(FLOPS / 10)
    assert found.evaluation.cache == pytest.approx(moved / 4)
    assert found.evaluation.memory == 2 * STATE
    assert found.evaluation.launch == (1 + 2 * 4) * 1000.0  # what begins a pass; four kernels a segment
    assert found.forward == found.evaluation
    # A block of segments takes all of them: 3 launches to recompute, 4 a segment for the chain, 6 for the weights.
    assert found.backward.launch == (1 + 3 + 2 * 4 + 6) * 1000.0
    assert found.backward.compute == pytest.approx(3 * FLOPS / 10)


def test_large_tiles_read_operands_less_often():
    """The first layer of GUNN-24: of a pixel and segment in 16-bit values, by hand; what else moves is the same."""
    sizes, k, s, n = LAYERS["gunn24-1"], 108, 36, 720
    limits = replace(H200, launch=0.0, cache_bandwidth=float("inf"))  # weights cost nothing

    def saved(which):
        small, large = (staged(sizes, 64, "bfloat16", limits, large_tiles=value) for value in (False, True))
        seconds = getattr(small, which).memory - getattr(large, which).memory
        return seconds * 4.3e12 / (2 * 64 * 32**2 * 20)

    # The state three times or once; in both units the 3x3's input twice or once.
    forward = 2 * n + 2 * k
    assert saved("forward") == pytest.approx(forward)
    # Gradients twice or once of the transposed 3x3, 12 times or 5 of the spread.
    chain = 2 * 2 * k + 2 * (k + s) * (12 - 5)
    # Operands of the weights' gradients: rows once for so many inputs, inputs once for so many rows.
    reduce = (k + s) * (12 - 6) + n * (3 - 1)
    spatial = k * (16 - 8) + 9 * k * (2 - 1)
    partials = 2 * 2 * (39 - 34) * 9 * k * k / (64 * 32**2)  # of float32, written and read: 34 ranges of pixels, not 39
    assert saved("backward") == pytest.approx(forward + chain + reduce + 2 * (spatial + partials))


def test_large_tiles_serve_16_bits_where_they_are_enough():
    for name, batch, dtype, serve in (
        ("gunn24-1", 64, "bfloat16", True),
        ("gunn24-1", 64, "float32", False),
        ("gunn15-8", 64, "float16", False),
        ("gunn18-1", 32, "float16", True),
    ):
        small, any_size = (staged(LAYERS[name], batch, dtype, H200, large_tiles=value) for value in (False, True))
        assert (small != any_size) == serve, name


def test_the_tiny_layer_by_hand_on_the_cpu():
    found = fused(TINY, 1, "float32", ROUND)
    assert found.evaluation == Parts(compute=FLOPS / 10, memory=2 * STATE)
    assert found.forward == found.evaluation + Parts(exchange=3 * 2 * 100.0, cache=2 * STATE / 4)
    assert fused(TINY, 1, "float32", ROUND, recompute=False).backward.compute == pytest.approx(2 * FLOPS / 10)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.__name__)
@pytest.mark.parametrize("sizes", LAYERS.values(), ids=LAYERS)
def test_parts_add_up_are_not_negative_and_grow_with_the_batch(variant, sizes):
    limits = H200 if variant is not fused else cpu_limits(2e11, 2e10, 2)
    before = (0.0, 0.0, 0.0)
    for batch in (1, 2, 3, 8, 16, 37, 64, 128, 512):
        found = variant(sizes, batch, "float32", limits)
        for parts in (found.forward, found.backward, found.evaluation):
            assert min(parts.values()) >= 0
            assert parts.total == pytest.approx(sum(parts.values()))
        now = (found.forward.total, found.backward.total, found.evaluation.total)
        assert all(a <= b * (1 + 1e-12) for a, b in zip(before, now, strict=True)), batch
        assert found.seconds("training") == found.forward.total + found.backward.total
        assert found.seconds("evaluation") == found.evaluation.total
        before = now


@pytest.mark.parametrize("name", ["gunn15-32", "gunn15-16", "gunn15-8"])
def test_the_persistent_forward_is_held_to_flops_bytes_and_exchanges(name):
    """At least: work at 60 % of the peak, x and y at the bandwidth of memory, three exchanges for a segment."""
    sizes = LAYERS[name]
    least = sizes.flops(64) / (0.6 * 790e12) + 2 * sizes.state_bytes(64, "bfloat16") / 4.3e12
    least += 3 * sizes.segments * H200.exchange
    found = persistent(sizes, 64, "bfloat16", H200).forward.total
    assert least <= found <= 2.2 * least  # beyond it: idle processors, a launch, what the products do not hide


def test_a_better_device_is_never_slower():
    better = replace(H200, memory_bandwidth=2 * H200.memory_bandwidth, launch=H200.launch / 2, exchange=0.0)
    for sizes in LAYERS.values():
        for variant in (staged, persistent, simultaneous):
            fast, slow = (variant(sizes, 32, "bfloat16", limits).seconds("training") for limits in (better, H200))
            assert fast <= slow
        fast, slow = (simultaneous(sizes, 32, "bfloat16", H200, library) for library in (FAST_LIBRARY, SLOW_LIBRARY))
        assert fast.seconds("training") < slow.seconds("training")


def test_keeping_pre_activations_moves_work_out_of_the_backward():
    sizes = LAYERS["gunn15-32"]
    for variant in (staged, persistent, fused):
        kept, recomputed = (variant(sizes, 16, "float32", H200, recompute=value) for value in (False, True))
        assert kept.backward.compute < recomputed.backward.compute
        assert kept.forward.total >= recomputed.forward.total


def test_limits_of_a_cpu_come_from_what_was_measured():
    limits = cpu_limits(200e9, 20e9, 4)
    assert limits.usable_flops("float32") == pytest.approx(0.6 * 200e9)
    assert limits.usable_flops("float64") == pytest.approx(0.6 * 100e9)
    assert limits.memory_bandwidth == 20e9
    assert limits.exchange > cpu_limits(200e9, 20e9, 1).exchange == 0


def test_what_cannot_be_predicted_is_said():
    with pytest.raises(ValueError, match="H200: no peak is known for float64; expected bfloat16, float16, float32"):
        staged(TINY, 1, "float64", H200)
    with pytest.raises(ValueError, match="unknown pass 'both'; expected training or evaluation"):
        staged(TINY, 1, "float32", ROUND).seconds("both")
    assert set(H200.peak_flops) <= set(BYTES)
