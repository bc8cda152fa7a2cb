// The loops of products: chunks of both operands staged, then multiplied.
//
// Small tiles have room for one chunk in shared memory and take turns: all stage, all multiply, and other blocks of the
// multiprocessor fill the gaps. Large tiles have room for two, and stage one while they multiply the other: weights by
// asynchronous copies; what has to be transformed on the way waits in registers, and is stored when the product is
// done.
//
// Barriers:  small: two a chunk, of depth pixels three, as the window moves with it. Large: one a chunk; whoever passes
// it
//            knows that its chunk has come, and that the one before has been multiplied.
// Costs:     2*rows*columns*depth FLOPs; reads every row and column of the tile once.
#pragma once

#include "cuda/weights.cuh"

namespace gunn {

// Pixels x packed weights. Begins with a barrier: what it reads may have been written just before.
template <class Precision, class Tile, class Source>
GUNN_DEVICE void multiply_pixels(Pool<Precision, Tile>& pool, Product<Precision, Tile>& product, const Source& source,
                                 const PackShape& shape, const PackedRows<Precision>& weights) {
  constexpr int kDepth = Pool<Precision>::kDepth;
  using Pixels = StagedPixels<Precision, Tile, Source>;
  Pixels pixels(source, shape.depth);
  const int chunks = shape.chunks<Precision>();
  auto* operands = pool.tile.operands;
  if constexpr (Tile::kChunks == 1) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      __syncthreads();
      weights.template copy<Tile::kThreads>(operands->b, chunk);
      copy_async_commit();
      GUNN_UNROLL
      for (int turn = 0; turn < Pixels::kTurns; ++turn) {
        pixels.load(pool.window[0], chunk * kDepth, turn);
        pixels.store(operands->a, turn);
      }
      copy_async_wait<0>();
      __syncthreads();
      product.template multiply<Layout::by_row>(*operands);
    }
  } else {
    static_assert(Pixels::kTurns == 1, "a chunk waits in registers");
    const auto load = [&](int chunk) {
      weights.template copy<Tile::kThreads>(operands[chunk % 2].b, chunk);
      copy_async_commit();
      pixels.load(pool.window[0], chunk * kDepth);
    };
    __syncthreads();  // the window is set
    load(0);
    pixels.store(operands[0].a);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const bool more = chunk + 1 < chunks;
      copy_async_wait<0>();
      __syncthreads();  // large: the chunk has come
      if (more) load(chunk + 1);
      product.template multiply<Layout::by_row>(operands[chunk % 2]);
      if (more) pixels.store(operands[(chunk + 1) % 2].a);
    }
  }
}

// `a_source` x `b_source`, channels from `a_first` and `b_first` on, over pixels [begin, end): gradients of weights.
template <class Precision, class Tile, class A, class B>
GUNN_DEVICE void multiply_channels(Pool<Precision, Tile>& pool, Product<Precision, Tile>& product,
                                   const Extents& extents, const A& a_source, int a_first, int a_channels,
                                   const B& b_source, int b_first, int b_channels, int64_t begin, int64_t end) {
  constexpr int kDepth = Pool<Precision>::kDepth, kTurn = Tile::kRows / kDepth;  // chunks of a window
  StagedChannels<Precision, Tile, A, Tile::kRows> a(a_source, a_first, a_channels);
  StagedChannels<Precision, Tile, B, Tile::kColumns> b(b_source, b_first, b_channels);
  auto* operands = pool.tile.operands;
  if constexpr (Tile::kChunks == 1) {
    for (int64_t first = begin; first < end; first += kDepth) {
      __syncthreads();  // the chunk before has been multiplied, its window is free
      set_window(pool.window[0], extents, first, min(first + kDepth, end));
      __syncthreads();
      a.stage(operands->a, pool.window[0]);
      b.stage(operands->b, pool.window[0]);
      __syncthreads();
      product.template multiply<Layout::by_depth>(*operands);
    }
  } else {
    const int chunks = static_cast<int>((end - begin + kDepth - 1) / kDepth);
    const auto set = [&](int turn) {
      const int64_t first = begin + static_cast<int64_t>(turn) * Tile::kRows;
      if (first < end) set_window(pool.window[turn % 2], extents, first, end);
    };
    const auto load = [&](int chunk) {
      const auto& window = pool.window[chunk / kTurn % 2];
      a.load(window, chunk % kTurn * kDepth);
      b.load(window, chunk % kTurn * kDepth);
    };
    const auto store = [&](int chunk) {
      a.store(operands[chunk % 2].a);
      b.store(operands[chunk % 2].b);
    };
    set(0);
    __syncthreads();  // the first window is set
    load(0);
    store(0);
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const bool more = chunk + 1 < chunks;
      __syncthreads();  // large: the chunk has been stored, the one before has been multiplied
      // The other window's last chunk has been loaded; the next chunk but some will want it.
      if (chunk % kTurn == 0) set(chunk / kTurn + 1);
      if (more) load(chunk + 1);
      product.template multiply<Layout::by_depth>(operands[chunk % 2]);
      if (more) store(chunk + 1);
    }
  }
}

}  // namespace gunn
