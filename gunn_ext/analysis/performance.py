"""How long a layer should take: predictions from its sizes and a device's limits, before anything is measured.

Every figure from here is a prediction. The rule is an upper bound in the spirit of a roofline: floating-point work at
`DeviceLimits.flop_share` of the peak, plus bytes at the bandwidth of the level they come from, plus exchanges of
statistics and kernel launches at what one of them costs. Parts are added, except where the docstring of a variant says
what hides what. A measured time far above its prediction says that the kernel loses time the plan did not foresee; one
below it, that the plan was too careful.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
PASSES = ("training", "evaluation")
_TILE = 64  # pixels of a block's share of work, at least
_LEAST_BLOCK = 32 * 2**20  # bytes that the staged backward may spend on a block of segments, at least
_LEAST_CHAIN = 64 * 2**20  # the same of the persistent one


@dataclass(frozen=True)
class LayerSizes:
    """What a layer's cost depends on; see `gunn_ext.parameters.StackedLayer`.

    Attributes:
        channels: N.
        segments: P.
        size: Height and width of the feature map.
        expansion: K.
        units: M.
        shortcut: Whether unit 0 has a projection shortcut.
    """

    channels: int
    segments: int
    size: int
    expansion: int = 2
    units: int = 1
    shortcut: bool = False

    @property
    def width(self) -> int:
        """Channels of a segment, s."""
        return self.channels // self.segments

    @property
    def hidden(self) -> int:
        """Channels inside a unit, k."""
        return self.expansion * self.width

    def units_in_order(self) -> list[tuple[int, int]]:
        """For each unit the channels it reads, and those its first convolutions (reduce, shortcut) make."""
        first = self.hidden + (self.width if self.shortcut else 0)
        return [(self.channels, first)] + [(self.width, self.hidden)] * (self.units - 1)

    def flops(self, batch: int) -> float:
        """Of a forward pass, multiplication and addition counted apart; as `gunn_ext.analysis.layer_flops`."""
        k, s = self.hidden, self.width
        per_pixel = sum(n * made + 9 * k * k + k * s for n, made in self.units_in_order())
        return 2.0 * batch * self.size**2 * self.segments * per_pixel

    def state_bytes(self, batch: int, dtype: str) -> float:
        """Of the feature map of a whole batch."""
        return float(batch * self.size**2 * self.channels * BYTES[dtype])


@dataclass(frozen=True)
class DeviceLimits:
    """What a device can do at best, in units of one second.

    Attributes:
        name: For tables.
        peak_flops: FLOP/s of large dense products, by dtype.
        memory_bandwidth: Bytes from and to memory.
        cache_bandwidth: Bytes from the last cache to all processors.
        cache_bytes: What that cache holds.
        shared_bandwidth: Bytes from the processors' own shared memories.
        exchange: One exchange of statistics between all processors.
        launch: One kernel in a CUDA graph beyond its work; on a CPU 0.
        processors: Multiprocessors, or threads.
        flop_share: Share of the peak that floating-point work is expected to reach.
    """

    name: str
    peak_flops: Mapping[str, float]
    memory_bandwidth: float
    cache_bandwidth: float
    cache_bytes: float
    shared_bandwidth: float
    exchange: float
    launch: float
    processors: int
    flop_share: float = 0.6

    def usable_flops(self, dtype: str) -> float:
        """FLOP/s that work in ``dtype`` is expected to reach.

        Raises:
            ValueError: No peak is known for ``dtype``.
        """
        if dtype not in self.peak_flops:
            raise ValueError(
                f"{self.name}: no peak is known for {dtype}; expected {', '.join(self.peak_flops)}. Give "
                "DeviceLimits one to predict it."
            )
        return self.flop_share * self.peak_flops[dtype]


# Peak of 16-bit products and memory bandwidth: measured on such a GPU. TF32: half of it, as its data sheet has it. The
# others are estimates from published measurements of the same architecture, to be replaced when they are measured.
H200 = DeviceLimits(
    name="H200",
    peak_flops={"bfloat16": 790e12, "float16": 790e12, "float32": 395e12},
    memory_bandwidth=4.3e12,
    cache_bandwidth=5.0e12,
    cache_bytes=60e6,
    shared_bandwidth=132 * 128 * 1.7e9,
    exchange=0.9e-6,
    launch=2.0e-6,
    processors=132,
)


def cpu_limits(
    flops: float, memory_bandwidth: float, threads: int = 1, *, cache_bytes: float = 32e6, exchange: float = 5e-6
) -> DeviceLimits:
    """Limits of a CPU from what was measured on it.

    Args:
        flops: FLOP/s in float32 with all threads, of fused multiply-adds or of a large matrix product; float64 is
            taken to reach half.
        memory_bandwidth: Bytes a second, reading and writing together.
        threads: Threads that were measured with.
        cache_bytes: Of the last cache (an estimate unless given).
        exchange: Seconds of a barrier with the combining of statistics (an estimate unless given).
    """
    return DeviceLimits(
        name=f"CPU, {threads} threads",
        peak_flops={"float32": flops, "float64": flops / 2},
        memory_bandwidth=memory_bandwidth,
        cache_bandwidth=4 * memory_bandwidth,
        cache_bytes=cache_bytes,
        shared_bandwidth=math.inf,
        exchange=exchange if threads > 1 else 0.0,
        launch=0.0,
        processors=threads,
    )


@dataclass(frozen=True)
class Parts:
    """Predicted seconds, by what they are spent on; what is hidden behind another part counts nothing.

    Attributes:
        compute: Floating-point work.
        memory: Bytes from and to memory.
        cache: Bytes from and to the last cache.
        shared: Bytes from shared memory.
        exchange: Statistics on their way.
        launch: Kernels that begin and end.
    """

    compute: float = 0.0
    memory: float = 0.0
    cache: float = 0.0
    shared: float = 0.0
    exchange: float = 0.0
    launch: float = 0.0

    def __add__(self, other: Parts) -> Parts:
        """Part by part."""
        return Parts(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[float, ...]:
        """The parts in the order of the fields."""
        return self.compute, self.memory, self.cache, self.shared, self.exchange, self.launch

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(self.values())


def _sum(parts: Iterable[Parts]) -> Parts:
    total = Parts()
    for part in parts:
        total = total + part
    return total


def _times(parts: Parts, count: float) -> Parts:
    return Parts(*(count * value for value in parts.values()))


@dataclass(frozen=True)
class Prediction:
    """What one variant is predicted to take.

    Attributes:
        forward: Of a training step.
        backward: Of a training step.
        evaluation: A forward with running statistics.
    """

    forward: Parts
    backward: Parts
    evaluation: Parts

    def seconds(self, which: str) -> float:
        """Of a ``"training"`` step, forward and backward, or of an ``"evaluation"``."""
        if which not in PASSES:
            raise ValueError(f"Prediction: unknown pass {which!r}; expected {' or '.join(PASSES)}.")
        return self.evaluation.total if which == "evaluation" else self.forward.total + self.backward.total


# --- Staged ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tile:
    """What a block of the staged driver computes: rows (pixels; inputs of a weight gradient) and columns."""

    rows: int
    columns: int

    def down(self, rows: int) -> int:
        return math.ceil(rows / self.rows)

    def across(self, columns: int) -> int:
        return math.ceil(columns / self.columns)


_SMALL, _LARGE = _Tile(64, 64), _Tile(128, 160)
_ENOUGH = 99  # large tiles, that they serve
_MOST_RANGES, _MOST_PARTIALS = 64, 4 * 2**20  # of a weight gradient: sums over ranges of pixels


def _choose(columns: int, large: int) -> _Tile:
    """As the driver does, where a product can take ``large`` large tiles at all."""
    return _LARGE if columns > _SMALL.columns and large >= _ENOUGH else _SMALL


@dataclass(frozen=True)
class _Stage:
    """One kernel of the staged driver.

    Attributes:
        flops: Of a pixel.
        once: Values of a pixel that are read or written once.
        again: Those that are read once for every tile of columns.
        columns: Of the product's result.
        weights: Values that every tile of pixels reads.
        large: Whether it can take large tiles.
    """

    flops: float
    once: float
    again: float
    columns: int
    weights: float = 0
    large: bool = False

    def tile(self, pixels: int, large: bool) -> _Tile:
        """Which one serves."""
        if not (large and self.large):
            return _SMALL
        return _choose(self.columns, _LARGE.down(pixels) * _LARGE.across(self.columns))


@dataclass(frozen=True)
class _Gradient:
    """One weight gradient of the staged driver: ``rows`` gradients of outputs with ``inputs``, summed over pixels."""

    rows: int
    inputs: int
    large: bool

    def tiles(self, tile: _Tile) -> int:
        return tile.down(self.inputs) * tile.across(self.rows)

    def plan(self, pixels: int, segments: int, large: bool) -> tuple[_Tile, int]:
        """The tile that serves blocks of so many segments, and the ranges that pixels are split over."""
        room = max(1, min(_MOST_RANGES, _MOST_PARTIALS // (self.rows * self.inputs)))
        wanted = 264 // (self.tiles(_LARGE) * segments) + 1
        ranges = min(wanted, math.ceil(pixels / 512), room)
        if large and self.large and _choose(self.rows, ranges * self.tiles(_LARGE) * segments) == _LARGE:
            return _LARGE, ranges
        return _SMALL, min(math.ceil(pixels / 1024), room)


def _unit_stages(k: int, s: int, n: int, made: int, first: bool) -> list[_Stage]:
    """Reduce, spatial, project; of the 3x3 neighbours come from close by."""
    return [
        _Stage(2 * n * made, made, n, made, n * made, large=first),
        _Stage(18 * k * k, k, k, k, 9 * k * k, large=True),
        _Stage(2 * k * s, s, k, s, k * s),
    ]


def _chain_stages(k: int, s: int, n: int, made: int) -> list[_Stage]:
    """The gradients' chain."""
    return [
        _Stage(0, 5 * s, 0, s),
        _Stage(2 * k * s, 2 * k, 2 * s, k, k * s),
        _Stage(18 * k * k, 2 * k, 2 * k, k, 9 * k * k, large=True),
        _Stage(2 * n * made, 2 * n, 2 * made, n, n * made, large=True),
    ]


def _gradients(k: int, s: int, n: int, made: int, first: bool) -> list[_Gradient]:
    return [_Gradient(made, n, large=first), _Gradient(k, 9 * k, large=True), _Gradient(s, k, large=False)]


@dataclass(frozen=True)
class _Staged:
    """A layer's segments on the staged driver, phase by phase; but for what a pass begins and ends with.

    Attributes:
        stages: Pre-activations and outputs, segment by segment.
        again: Pre-activations for the backward, blocks of segments at once.
        chain: Of gradients, segment by segment.
        gradients: Of weights, blocks of segments at once.
    """

    stages: Parts
    again: Parts
    chain: Parts
    gradients: Parts


def _by_stages(
    sizes: LayerSizes,
    batch: int,
    dtype: str,
    limits: DeviceLimits,
    block: int,
    *,
    large_tiles: bool = True,
    hidden_gradients: bool = True,
) -> _Staged:
    pixels, k, s = batch * sizes.size**2, sizes.hidden, sizes.width
    item, usable = BYTES[dtype], limits.usable_flops(dtype)
    in_cache = sizes.state_bytes(batch, dtype) + 2 * (k + s) * pixels * item <= limits.cache_bytes
    large = large_tiles and item == 2

    def moved(values: float, weights: float = 0.0) -> Parts:
        cached = (weights + (values if in_cache else 0.0)) * item / limits.cache_bandwidth
        return Parts(cache=cached, memory=0.0 if in_cache else values * item / limits.memory_bandwidth)

    def stage(work: _Stage, segments: int = 1) -> Parts:
        tile = work.tile(pixels, large)
        down, across = tile.down(pixels), tile.across(work.columns)
        tiles = down * across * segments
        idle = math.ceil(tiles / limits.processors) * limits.processors / tiles
        parts = moved((work.once + work.again * across) * pixels * segments, work.weights * down * segments)
        return parts + Parts(compute=work.flops * pixels * segments / usable * idle, launch=limits.launch)

    def gradient(work: _Gradient, segments: int) -> Parts:
        tile, ranges = work.plan(pixels, segments, large)
        values = work.rows * tile.down(work.inputs) + work.inputs * tile.across(work.rows)
        partials = 2 * ranges * work.rows * work.inputs * 4 / item  # written and read
        flops = 2.0 * work.rows * work.inputs * pixels * segments
        parts = moved((values * pixels + partials) * segments)
        return parts + Parts(compute=flops / usable, launch=2 * limits.launch)

    units = [(n, made, m == 0) for m, (n, made) in enumerate(sizes.units_in_order())]
    unit_stages = [work for n, made, first in units for work in _unit_stages(k, s, n, made, first)]
    write_back = _Stage(0, 4 * s, 0, s)
    chain = [work for n, made, _ in units for work in _chain_stages(k, s, n, made)]
    gradients = [
        work for n, made, first in units for work in _gradients(k, s, n, made, first)[: 3 if hidden_gradients else 1]
    ]
    blocks = sizes.segments / block
    return _Staged(
        _times(_sum(stage(work) for work in [*unit_stages, write_back]), sizes.segments),
        _times(_sum(stage(work, block) for work in unit_stages), blocks),
        _times(_sum(stage(work) for work in chain), sizes.segments),
        _times(_sum(gradient(work, block) for work in gradients), blocks),
    )


def staged(
    sizes: LayerSizes,
    batch: int,
    dtype: str,
    limits: DeviceLimits,
    *,
    recompute: bool = True,
    large_tiles: bool = True,
) -> Prediction:
    """A kernel for each stage of each segment: nothing hides behind anything, and every kernel costs its launch.

    What kernels hand to each other comes from the cache where the state and one segment's pre-activations fit there,
    else from memory; weights, which every tile of pixels reads, always from the cache. Products in 16 bits take large
    tiles by the driver's rule. Where a kernel has fewer tiles than the device has processors, or its last round of
    tiles is not full, the others idle.

    Args:
        sizes: Of the layer.
        batch: Images.
        dtype: Of the feature map.
        limits: Of the device.
        recompute: Whether the backward recomputes pre-activations; else the forward writes them for it.
        large_tiles: Whether there are any; else what it costs without them.
    """
    pixels, k, s, item = batch * sizes.size**2, sizes.hidden, sizes.width, BYTES[dtype]
    state = sizes.state_bytes(batch, dtype)
    # Blocks of segments are recomputed at once and their weight gradients computed at once.
    per_segment = (4 * k + 3 * s) * sizes.units * pixels * item
    block = max(1, min(sizes.segments, int(max(state, _LEAST_BLOCK) // per_segment)))
    phases = _by_stages(sizes, batch, dtype, limits, block, large_tiles=large_tiles)
    compulsory = Parts(memory=2 * state / limits.memory_bandwidth, launch=limits.launch)  # weights are packed in one
    evaluation = compulsory + phases.stages
    kept = 0.0 if recompute else (2 * k + 2 * s) * sizes.units * sizes.segments * pixels * item
    forward = evaluation + Parts(memory=kept / limits.memory_bandwidth)
    backward = Parts(memory=(4 * state + kept) / limits.memory_bandwidth, launch=limits.launch)
    backward += phases.chain
    if recompute:
        backward += phases.again
    backward += phases.gradients
    return Prediction(forward, backward, evaluation)


# --- Persistent -----------------------------------------------------------------------------------------------------


_TURN = 256  # pixels of a band where blocks have several


def _most_pixels(k: int, item: int) -> int:
    """Of a block that has one band, as the driver's templates have it, for values of ``item`` bytes."""
    return 512 if k <= 24 else 512 // item


def _warp_pixels(share: float, k: int, item: int) -> int:
    """Pixels of a warp, whose block has ``share`` pixels or somewhat more: as the driver's templates have it."""
    if share <= 128:
        return 16
    return 32 if share <= 256 or share > _most_pixels(k, item) or k > 24 else 64


def persistent(
    sizes: LayerSizes, batch: int, dtype: str, limits: DeviceLimits, *, recompute: bool = True, on_chip: float = 0.6
) -> Prediction:
    """One launch for the whole layer, the state on the chip; three exchanges of statistics for a segment and unit.

    More pixels than all processors hold at once, one to a block: in training blocks take turns, so every segment reads
    the whole state, and what a step leaves goes through cache or memory to the next one. Evaluation takes some images
    after others, whose state stays on the chip.

    Weights, for every block, and the share of the state that finds no room on the chip, stream from the cache under
    the products, as operands from shared memory do, where each warp reads all weights for its own pixels: of
    compute, cache and shared only the largest counts. The state is read and written once. Evaluation exchanges
    nothing. The backward takes blocks of segments: it recomputes them, runs their chain of gradients, which
    exchanges as often as the forward, and takes the gradients of their weights.

    Of two units blocks take turns in training however many there are; evaluation, recomputation and the gradients of
    the reduces' weights are the staged driver's. Whether the driver takes a layer is not asked here: this is what it
    would cost.

    Args:
        sizes: Of the layer.
        batch: Images.
        dtype: Of the feature map.
        limits: Of the device.
        recompute: Whether the backward recomputes pre-activations; else the forward writes them for it.
        on_chip: Share of a state as large as the cache's half that stays on the chip; smaller ones stay as a whole.
    """
    pixels, k, s, segments = batch * sizes.size**2, sizes.hidden, sizes.width, sizes.segments
    item, usable = BYTES[dtype], limits.usable_flops(dtype)
    state = sizes.state_bytes(batch, dtype)
    at_once = max(1, limits.processors - 1) * _most_pixels(k, item)
    stacked = sizes.units > 1
    turns = stacked or pixels > at_once
    # In evaluation of the images that are there at once.
    streamed = max(0.0, state - on_chip * limits.cache_bytes / 2 * math.ceil(pixels / at_once)) * segments
    tiles = math.ceil(pixels / _TILE) * math.ceil(sizes.units_in_order()[0][1] / _TILE)
    idle = math.ceil(tiles / limits.processors) * limits.processors / tiles
    weights = sum(n * made + 9 * k * k + k * s for n, made in sizes.units_in_order()) * segments * item
    operands = pixels * weights / _warp_pixels(pixels / limits.processors, k, item)
    operands += sum(n + 9 * k for n, _ in sizes.units_in_order()) * pixels * segments * item
    in_cache = state <= limits.cache_bytes

    def moved(bytes_: float) -> Parts:
        if in_cache:
            return Parts(cache=bytes_ / limits.cache_bandwidth)
        return Parts(memory=bytes_ / limits.memory_bandwidth)

    def products(flops: float, cache_bytes: float, shared_bytes: float) -> Parts:
        compute = flops / usable * idle
        cache = cache_bytes / (limits.cache_bandwidth if in_cache else limits.memory_bandwidth)
        shared = shared_bytes / limits.shared_bandwidth
        hidden = max(compute, cache)
        return Parts(compute=compute, cache=hidden - compute, shared=max(0.0, shared - hidden))

    flops = sizes.flops(batch)
    blocks = min(tiles, limits.processors)
    # Weights are packed in a launch of its own.
    once = Parts(memory=2 * state / limits.memory_bandwidth, launch=2 * limits.launch)
    evaluation = once + products(flops, weights * blocks + streamed, operands)
    # Weights that do not fit into shared memory are read for every band.
    bands = max(blocks, pixels / _TURN) if turns and k > 24 else blocks
    kept = (2 * k + 2 * s) * sizes.units * segments * pixels * item
    exchanges = Parts(exchange=3 * segments * sizes.units * limits.exchange)
    # In turns a step's results are written for the next one, rows at edges as words of twice the bytes.
    between = 2 * (2 * k + 2 * s + 4 * k / max(1, _TURN // sizes.size)) * sizes.units * segments * pixels * item
    forward = evaluation + exchanges
    if turns:
        forward = once + products(flops, weights * bands + state * segments, operands) + exchanges + moved(between)
    if not recompute:
        forward += Parts(memory=kept / limits.memory_bandwidth)
    # Three phases. Pre-activations are written, or were kept, read by the chain, and two of four for the weights; their
    # gradients written and read once. For the weights the state is read once for two segments; of wide ones once for
    # each, gradients once for 128 channels, and z1 with dz2 three times.
    chain = products(flops, weights * bands + 2 * (state * segments if turns else streamed), operands) + exchanges
    chain += Parts(memory=(2 * state + 2 * kept) / limits.memory_bandwidth)
    if turns:
        chain += moved(between)
    read = sizes.channels / 2 if k <= 24 else sizes.channels + k * math.ceil(sizes.channels / 128) + 4 * k
    weight_gradients = products(flops, read * item * pixels * segments, operands)
    weight_gradients += Parts(memory=(1 + k / (k + s)) * kept / limits.memory_bandwidth)
    each = 2 * kept / segments
    block = max(1, min(segments, int(max(_LEAST_CHAIN, 3 * state) // each)))
    launches = math.ceil(segments / block)
    if stacked:
        # z1, a row beside four, and dz2 in three parts, z2 and dz3.
        phases = _by_stages(sizes, batch, dtype, limits, block, hidden_gradients=False)
        values = (3 * 2.25 + 1) * k + s
        hidden = Parts(compute=2 * (9 * k * k + k * s) * pixels * segments * sizes.units / usable)
        hidden += moved(values * pixels * segments * sizes.units * item)
        backward = chain + phases.gradients + hidden
        backward += Parts(launch=(1 + (1 + 2 * sizes.units) * launches) * limits.launch)
        if recompute:
            backward += phases.again
        return Prediction(forward, backward, once + phases.stages)
    backward = chain + weight_gradients + Parts(launch=(1 + (4 if k <= 24 else 5) * launches) * limits.launch)
    if recompute:
        again = products(flops, weights * blocks + streamed, operands)
        backward += again + Parts(memory=(launches * state + kept) / limits.memory_bandwidth)
        backward += Parts(launch=launches * limits.launch)
    return Prediction(forward, backward, evaluation)


# --- On the CPU -----------------------------------------------------------------------------------------------------


def fused(sizes: LayerSizes, batch: int, dtype: str, limits: DeviceLimits, *, recompute: bool = True) -> Prediction:
    """The CPU kernels: a thread keeps its images; in training three barriers for a segment and unit, each way.

    In training every segment sweeps over the whole batch, whose state comes from memory where the cache is too small.
    """
    state, usable = sizes.state_bytes(batch, dtype), limits.usable_flops(dtype)
    swept = state * sizes.segments
    in_cache = 2 * state <= limits.cache_bytes

    def sweep(bytes_: float) -> Parts:
        if in_cache:
            return Parts(cache=bytes_ / limits.cache_bandwidth)
        return Parts(memory=bytes_ / limits.memory_bandwidth)

    flops = sizes.flops(batch)
    barriers = Parts(exchange=3 * sizes.segments * sizes.units * limits.exchange)
    evaluation = Parts(compute=flops / usable, memory=2 * state / limits.memory_bandwidth)
    forward = evaluation + barriers + sweep(swept)
    backward = (
        Parts(compute=(3 if recompute else 2) * flops / usable, memory=4 * state / limits.memory_bandwidth)
        + barriers
        + sweep((3 if recompute else 2) * swept)
    )
    return Prediction(forward, backward, evaluation)


# --- SUNN as a library's convolutions -------------------------------------------------------------------------------


@dataclass(frozen=True)
class LibraryLimits:
    """How well a convolution library is expected to do, as shares of a device's limits; all of it is estimated.

    Attributes:
        dense: Share of the peak that 1x1 convolutions reach.
        narrow: Share that grouped 3x3 convolutions of fewer than 80 channels reach: the least certain number here.
        wide: The same for those of 80 channels and more.
        bandwidth: Share of the bandwidth that element-wise kernels reach.
        gap: Seconds between two kernels of a graph.
        shortest: Seconds of the shortest useful kernel.
    """

    dense: float
    narrow: float
    wide: float
    bandwidth: float
    gap: float
    shortest: float


FAST_LIBRARY = LibraryLimits(dense=0.76, narrow=0.28, wide=0.53, bandwidth=0.95, gap=0.8e-6, shortest=1.6e-6)
SLOW_LIBRARY = LibraryLimits(dense=0.57, narrow=0.11, wide=0.28, bandwidth=0.80, gap=1.4e-6, shortest=2.2e-6)


def simultaneous(
    sizes: LayerSizes, batch: int, dtype: str, limits: DeviceLimits, library: LibraryLimits = FAST_LIBRARY
) -> Prediction:
    """SUNN as grouped convolutions, batch norms, ReLUs and additions, each a kernel of a CUDA graph.

    A kernel takes the longest of its work, its bytes and the shortest kernel, and the gap to the next.
    """
    pixels, k, s, item = batch * sizes.size**2, sizes.hidden, sizes.width, BYTES[dtype]
    inner, outer = float(sizes.segments * k * pixels * item), sizes.state_bytes(batch, dtype)
    peak = limits.usable_flops(dtype) / limits.flop_share
    grouped = library.narrow if k < 80 else library.wide

    def kernel(moved: float, flops: float = 0.0, share: float = 1.0) -> Parts:
        # What was just written is read back from the cache where it fits.
        cached = moved < 0.75 * limits.cache_bytes
        bandwidth = library.bandwidth * (limits.cache_bandwidth if cached else limits.memory_bandwidth)
        work, bytes_ = flops / (share * peak), moved / bandwidth
        if max(work, bytes_) < library.shortest:
            return Parts(launch=library.shortest + library.gap)
        if work > bytes_:
            return Parts(compute=work, launch=library.gap)
        if cached:
            return Parts(cache=bytes_, launch=library.gap)
        return Parts(memory=bytes_, launch=library.gap)

    def kernels(make: Callable[[int], list[Parts]]) -> Parts:
        return _sum(part for m in range(sizes.units) for part in make(m))

    small = Parts(launch=library.shortest + library.gap)
    per_segment = 2.0 * pixels * sizes.segments

    def shapes(m: int) -> tuple[float, float, bool, float]:
        """FLOPs and share of the peak of the first convolution of unit m, whether it has a shortcut, its bytes."""
        dense = m == 0
        return (
            per_segment * k * (sizes.channels if dense else s),
            library.dense if dense else grouped / 2,
            dense and sizes.shortcut,
            outer + inner,
        )

    def norms(m: int) -> list[float]:
        return [inner, inner, outer] + ([outer] if shapes(m)[2] else [])

    def convolutions(m: int) -> list[Parts]:
        flops, share, shortcut, moved = shapes(m)
        made = [
            kernel(moved, flops, share),
            kernel(2 * inner, per_segment * 9 * k * k, grouped),
            kernel(inner + outer, per_segment * k * s, grouped / 2),
        ]
        if shortcut:
            made += [kernel(2 * outer, per_segment * s * sizes.channels, library.dense), kernel(3 * outer)]
        return made + [kernel(3 * outer), kernel(2 * inner), kernel(2 * inner)]

    def batch_statistics(m: int) -> list[Parts]:
        return [part for moved in norms(m) for part in (kernel(moved), small, small, kernel(2 * moved))]

    def gradients(m: int) -> list[Parts]:
        flops, share, shortcut, moved = shapes(m)
        spatial, project = per_segment * 9 * k * k, per_segment * k * s
        made = [part for size in norms(m) for part in (kernel(2 * size), kernel(3 * size))]
        made += [kernel(3 * inner), kernel(3 * inner)]  # through the ReLUs
        made += [kernel(moved, flops, share), kernel(moved, flops, 0.7 * share)]
        made += [kernel(2 * inner, spatial, 0.9 * grouped), kernel(2 * inner, spatial, 0.5 * grouped), small]
        made += [kernel(inner + outer, project, grouped / 2), kernel(inner + outer, project, grouped / 3), small]
        if shortcut:
            flops = per_segment * s * sizes.channels
            made += [kernel(2 * outer, flops, library.dense), kernel(2 * outer, flops, 0.7 * library.dense)]
            made += [kernel(3 * outer), small]
        return made + [kernel(3 * outer), small, small, small]

    evaluated = kernels(lambda m: [kernel(2 * moved) for moved in norms(m)])
    forward = kernels(convolutions) + kernels(batch_statistics)
    return Prediction(forward, kernels(gradients), kernels(convolutions) + evaluated)
