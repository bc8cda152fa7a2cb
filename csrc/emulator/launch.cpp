// A launch: checked as a GPU's driver would, then its teams are dealt to OS threads.
//
//   GUNN_EMULATOR_SEED      a number: threads and blocks run in an order drawn with it; unset: in their own order
//   GUNN_EMULATOR_WORKERS   OS threads for the blocks of ordinary launches, 1 unless set
//   GUNN_EMULATOR_STACK_KB  stack of each CUDA thread, 256 unless set
//   GUNN_EMULATOR_SLOW      a block of cooperative launches, by number: it goes on only while all others wait
//   GUNN_EMULATOR_PROCESSORS  multiprocessors that the device claims to have, 16 unless set
//   GUNN_EMULATOR_SHARED_KB   shared memory that it claims to have for a block, 227 unless set, as on sm_90
//
// All are read at every launch. The results of a right kernel depend on none of them.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "core/error.h"
#include "emulator/memory.h"
#include "emulator/primitives.h"
#include "emulator/sanitizers.h"
#include "emulator/team.h"

namespace gunn::emulator {
namespace {

std::optional<uint64_t> number_from(const char* variable) {
  const char* text = std::getenv(variable);
  if (!text || !*text) return std::nullopt;
  char* end = nullptr;
  const uint64_t number = std::strtoull(text, &end, 10);
  require(*end == 0, variable, "=", text, ": expected a number.");
  return number;
}

void check(const Configuration& c) {
  const auto inside = [&](const char* what, dim3 d, dim3 most, uint64_t most_together) {
    const uint64_t together = uint64_t{d.x} * d.y * d.z;
    require(together > 0 && d.x <= most.x && d.y <= most.y && d.z <= most.z && together <= most_together, what, " (",
            d.x, ", ", d.y, ", ", d.z, ") must lie between 1 and (", most.x, ", ", most.y, ", ", most.z,
            "), with a product of at most ", most_together, ".");
  };
  inside("grid", c.grid, dim3(0x7fffffff, 65535, 65535), 0x7fffffff);
  inside("block", c.block, dim3(1024, 1024, 64), 1024);
  inside("cluster", c.cluster, dim3(16, 16, 16), 16);
  require(c.grid.x % c.cluster.x == 0 && c.grid.y % c.cluster.y == 0 && c.grid.z % c.cluster.z == 0,
          "the grid must be whole clusters.");
  require(c.shared <= most_shared(), c.shared, " bytes of dynamic shared memory; a block has at most ", most_shared(),
          ". Use a smaller tile.");
}

// Teams keep their stacks between launches.
class Pool {
 public:
  std::unique_ptr<Team> take() {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (teams_.empty()) return std::make_unique<Team>();
    std::unique_ptr<Team> team = std::move(teams_.back());
    teams_.pop_back();
    return team;
  }
  void give_back(std::unique_ptr<Team> team) {
    const std::lock_guard<std::mutex> guard(mutex_);
    teams_.push_back(std::move(team));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Team>> teams_;
};

// Never destroyed: a launch may come from a thread that outlives main.
Pool& pool = *new Pool;

// Deals the teams of a launch, and keeps the first error.
class Dealer {
 public:
  explicit Dealer(const Job& job) : job_(job), order_(job.teams) {
    std::iota(order_.begin(), order_.end(), 0u);
    if (job.seed) {
      std::mt19937_64 random(*job.seed);
      std::shuffle(order_.begin(), order_.end(), random);
    }
  }

  void work() {
    std::unique_ptr<Team> team = pool.take();
    release(job_.started);  // the OS thread's own variables come first: its fibers may have lived on another before
    bool spent = false;
    try {
      for (std::optional<unsigned> next = deal(); next; next = deal()) team->run(job_, *next);
    } catch (...) {
      spent = true;
      const std::lock_guard<std::mutex> guard(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    const Unwatched unwatched;
    if (spent) {
      team.reset();
    } else {
      pool.give_back(std::move(team));
    }
  }

  std::exception_ptr error() const { return error_; }

 private:
  std::optional<unsigned> deal() {
    const std::lock_guard<std::mutex> guard(mutex_);
    if (error_ || dealt_ == order_.size()) return std::nullopt;
    return order_[dealt_++];
  }

  const Job& job_;
  std::vector<unsigned> order_;
  size_t dealt_ = 0;
  std::mutex mutex_;
  std::exception_ptr error_;
};

}  // namespace

int processors() { return static_cast<int>(number_from("GUNN_EMULATOR_PROCESSORS").value_or(16)); }
size_t most_shared() { return number_from("GUNN_EMULATOR_SHARED_KB").value_or(227) * 1024; }

void run(const Configuration& configuration, void (*body)(void*), void* arguments) {
  check(configuration);
  const auto volume = [](dim3 d) { return d.x * d.y * d.z; };
  const unsigned clusters = volume(configuration.grid) / volume(configuration.cluster);
  const auto tokens = std::make_unique<char[]>(2);
  const Job job{configuration,
                body,
                arguments,
                number_from("GUNN_EMULATOR_SEED"),
                number_from("GUNN_EMULATOR_SLOW"),
                configuration.cooperative ? 1 : clusters,
                number_from("GUNN_EMULATOR_STACK_KB").value_or(256) * 1024,
                most_shared(),
                &tokens[0],
                &tokens[1]};
  release(job.started);
  Dealer dealer(job);
  const uint64_t wanted = number_from("GUNN_EMULATOR_WORKERS").value_or(1);
  std::vector<std::thread> helpers;
  for (uint64_t i = 1; i < std::min<uint64_t>(wanted, job.teams); ++i) helpers.emplace_back([&] { dealer.work(); });
  dealer.work();
  for (std::thread& helper : helpers) helper.join();
  acquire(job.ended);
  if (dealer.error()) std::rethrow_exception(dealer.error());
}

}  // namespace gunn::emulator
