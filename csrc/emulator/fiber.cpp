#include "emulator/fiber.h"

#include <sys/mman.h>

#include <cstdint>

#include "core/error.h"
#include "emulator/sanitizers.h"

#ifndef GUNN_EMULATOR_UCONTEXT
// Saves what a called function must preserve, leaves the stack pointer in *save, goes on at `load`.
extern "C" void gunn_emulator_switch(void** save, void* load);
// Where a new stack goes on: calls r14 with r15 as its argument.
extern "C" void gunn_emulator_enter();
asm(R"(
.text
.p2align 4
.hidden gunn_emulator_switch
.globl gunn_emulator_switch
.type gunn_emulator_switch, @function
gunn_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size gunn_emulator_switch, .-gunn_emulator_switch
.p2align 4
.hidden gunn_emulator_enter
.globl gunn_emulator_enter
.type gunn_emulator_enter, @function
gunn_emulator_enter:
  mov %r15, %rdi
  jmp *%r14
.size gunn_emulator_enter, .-gunn_emulator_enter
)");
#endif

namespace gunn::emulator {
namespace {

constexpr size_t kPage = 4096;

// Stacks begin at different cache sets; otherwise the tops of all of them would compete for the same few lines.
size_t colour(unsigned number) { return number % 32 * 320; }

}  // namespace

Fiber::Fiber(size_t stack_bytes, unsigned number, void (*entry)(void*), void* argument)
    : owns_stack_(true), stack_bytes_(stack_bytes), entry_(entry), argument_(argument) {
  void* stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  require(stack != MAP_FAILED && mprotect(stack, kPage, PROT_NONE) == 0, "emulator: no room for the stack of fiber ",
          number, " (", stack_bytes, " bytes). Launch fewer threads at once, or raise vm.max_map_count.");
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(stack, stack_bytes);  // an abandoned fiber's marks
  if (__tsan_create_fiber) race_context_ = __tsan_create_fiber(0);
  stack_ = stack;
  const size_t usable = stack_bytes - colour(number);
#ifdef GUNN_EMULATOR_UCONTEXT
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = usable;
  const uintptr_t self = reinterpret_cast<uintptr_t>(this);
  makecontext(&context_, reinterpret_cast<void (*)()>(+[](unsigned high, unsigned low) {
    start(reinterpret_cast<Fiber*>(static_cast<uintptr_t>(high) << 32 | low));
  }),
              2, static_cast<unsigned>(static_cast<uint64_t>(self) >> 32), static_cast<unsigned>(self));
#else
  // As gunn_emulator_switch pops them: r15, r14, four more registers, the address for `ret`; then a zero where a
  // caller's return address would be, which ends a backtrace.
  void** top = reinterpret_cast<void**>(static_cast<char*>(stack) + usable) - 8;
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[0] = this;
  top[1] = reinterpret_cast<void*>(&start);
  top[6] = reinterpret_cast<void*>(&gunn_emulator_enter);
  stack_pointer_ = top;
#endif
}

Fiber::~Fiber() {
  if (!owns_stack_) return;
  if (race_context_) __tsan_destroy_fiber(race_context_);
  munmap(const_cast<void*>(stack_), stack_bytes_);
}

void Fiber::adopt_thread() {
  if (__tsan_get_current_fiber) race_context_ = __tsan_get_current_fiber();
}

void Fiber::release_as(void* token) {
  if (!race_context_) return;
  void* const mine = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(race_context_, 1);
  release(token);
  __tsan_switch_to_fiber(mine, 1);
}

void Fiber::start(Fiber* fiber) {
  fiber->landed();
  fiber->entry_(fiber->argument_);
  __builtin_trap();  // an entry never returns
}

void Fiber::switch_to(Fiber& to) {
  to.came_from_ = this;
  if (race_context_) __tsan_switch_to_fiber(to.race_context_, 1);  // 1: the switch itself orders nothing
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&fake_stack_, to.stack_, to.stack_bytes_);
#ifdef GUNN_EMULATOR_UCONTEXT
  swapcontext(&context_, &to.context_);
#else
  gunn_emulator_switch(&stack_pointer_, to.stack_pointer_);
#endif
  landed();
}

// AddressSanitizer tells the bounds of the stack we came from: so an OS thread's own become known.
void Fiber::landed() {
  if (!__sanitizer_finish_switch_fiber) return;
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(fake_stack_, &stack, &bytes);
  if (!came_from_->owns_stack_) {
    came_from_->stack_ = stack;
    came_from_->stack_bytes_ = bytes;
  }
}

}  // namespace gunn::emulator
