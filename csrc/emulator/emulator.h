// Runs CUDA kernels on the CPU, so that they are tested where there is no GPU. Included by cuda/launch.cuh under g++.
//
//   vocabulary.h   CUDA's keywords, vector types, built-in variables and small functions
//   primitives.h   what a kernel asks of the scheduler; synchronization.h and atomics.h give it CUDA's names
//   fiber          one stack and context per CUDA thread
//   team           the blocks that run at the same time: one block, a cluster, or a cooperative grid
//   warp, mma      functions that the lanes of a warp call together
//   memory         shared memory of a block, asynchronous copies
//   launch         checks a launch, deals its blocks to OS threads
//
// A thread runs until it waits: for a barrier, its warp, or a polled value. So a schedule is a choice of who goes on;
// GUNN_EMULATOR_SEED makes that choice at random and repeatable. When nobody can go on the launch fails with a list of
// who waits where. A loop that waits for another thread has to be a poll(): a bare one would spin for ever.
//
// AddressSanitizer sees overruns (every array is a heap block of its own, of exact size), ThreadSanitizer missing
// barriers (every CUDA thread is a thread to it; at about 1 MB each, so test small launches). Nothing here shows
// timing, bank conflicts or weak memory order.
//
// Compile kernels with any sanitizer, but never emulator/*.cpp: they speak to the sanitizers themselves.
#pragma once

#include "emulator/atomics.h"
#include "emulator/numbers.h"
#include "emulator/primitives.h"
#include "emulator/synchronization.h"
#include "emulator/vocabulary.h"
