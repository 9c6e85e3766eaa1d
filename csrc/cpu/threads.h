// Work cut into units that threads take one after the other: torch's own threads, as many as torch.set_num_threads says.
//
// What a unit computes does not depend on who computes it, so that results have the same bits for any number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include <pthread.h>

#include <torch/csrc/stable/ops.h>

namespace attnreg::cpu {

// Whether this process was forked from one that had loaded the library, or attnreg, which then says so. Threads do not survive a
// fork, and OpenMP's pool waits for them forever: a forked process computes alone.
inline std::atomic<bool> forked{false};

inline const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

// Calls `run(unit)` for the units 0 .. units - 1, each once. `operations` is what all of them cost: a thread is woken for no less
// than `kWorthAThread`.
template <class Run>
void for_each_unit(int64_t units, double operations, const Run& run) {
  constexpr double kWorthAThread = 1 << 18;
  const int64_t wanted = std::min(units, static_cast<int64_t>(std::min(operations / kWorthAThread, 1e9)));
  const int64_t threads =
      wanted < 2 || forked.load(std::memory_order_relaxed) ? 1 : std::min<int64_t>(wanted, torch::stable::get_num_threads());
  if (threads < 2) {
    for (int64_t unit = 0; unit < units; ++unit) run(unit);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t unit = next.fetch_add(1); unit < units; unit = next.fetch_add(1)) run(unit);
  });
}

}  // namespace attnreg::cpu
