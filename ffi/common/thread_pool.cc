#include "thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace aqua {
namespace {

using Function = std::function<void(int64_t, int)>;

// How long an idle worker (and a caller whose tasks are done) burns its core before it gives it
// away. Consecutive handlers of one layer are 5-40 us apart; waking a sleeper costs 5-50 us here.
constexpr std::chrono::microseconds kSpin{50};

thread_local bool in_parallel_for = false;

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

// Spins until `ready()` or kSpin has passed; says whether it is ready.
template <typename Ready>
bool spin_until(Ready ready) {
  const auto deadline = std::chrono::steady_clock::now() + kSpin;
  for (;;) {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return true;
      pause_cpu();
    }
    if (std::chrono::steady_clock::now() > deadline) return ready();
  }
}

class ThreadPool {
 public:
  explicit ThreadPool(int threads) {
    // Signals belong to the interpreter's threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int worker = 1; worker < threads; ++worker) {
      workers_.emplace_back([this, worker] { work(worker); });
      // 15 letters at most; failing is no harm.
      pthread_setname_np(workers_.back().native_handle(), "aqua-compute");
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  // Runs the tasks if the pool is free; false, with nothing run, if another call has it.
  bool try_run(int64_t n_tasks, const Function& fn) {
    if (taken_.exchange(true, std::memory_order_acquire)) return false;
    fn_ = &fn;
    n_tasks_ = n_tasks;
    done_.store(0, std::memory_order_relaxed);
    unclaimed_.store(n_tasks, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
    }
    claim_all(0);
    // A worker that was preempted in the middle of a task needs the core more than we do.
    const auto finished = [&] { return done_.load(std::memory_order_acquire) == n_tasks; };
    if (!spin_until(finished)) {
      while (!finished()) sched_yield();
    }
    taken_.store(false, std::memory_order_release);
    return true;
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopped_.store(true, std::memory_order_seq_cst);
      wake_.notify_all();
    }
    for (std::thread& worker : workers_) {
      if (worker.joinable()) worker.join();
    }
  }

 private:
  // A successful decrement belongs to the job that is current at that moment, and that job cannot
  // end before the claimed task has: so fn_ and n_tasks_ are read only after it.
  void claim_all(int worker) {
    in_parallel_for = true;
    int64_t left = unclaimed_.load(std::memory_order_acquire);
    while (left > 0) {
      if (!unclaimed_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel)) continue;
      (*fn_)(n_tasks_ - left, worker);
      done_.fetch_add(1, std::memory_order_acq_rel);
      left = unclaimed_.load(std::memory_order_acquire);
    }
    in_parallel_for = false;
  }

  void work(int worker) {
    const auto called = [this] {
      return unclaimed_.load(std::memory_order_seq_cst) > 0 ||
             stopped_.load(std::memory_order_seq_cst);
    };
    for (;;) {
      if (!spin_until(called)) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, called);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
      if (stopped_.load(std::memory_order_seq_cst)) return;
      claim_all(worker);
    }
  }

  alignas(64) std::atomic<bool> taken_{false};
  const Function* fn_ = nullptr;
  int64_t n_tasks_ = 0;
  alignas(64) std::atomic<int64_t> unclaimed_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stopped_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
};

// Never destroyed: threads of XLA may still be inside a handler while static destructors run.
std::atomic<ThreadPool*> current_pool{nullptr};
std::atomic<ThreadPool*> stopped_pool{nullptr};  // stays reachable, so that it counts as no leak
std::atomic<bool> pool_stopped{false};

void forget_pool_in_child() {
  // The child of a fork has none of its parent's threads; it starts its own on first use.
  current_pool.store(nullptr);
  in_parallel_for = false;
}

ThreadPool* pool() {
  ThreadPool* found = current_pool.load(std::memory_order_acquire);
  if (found != nullptr) return found;
  static std::atomic_flag creating = ATOMIC_FLAG_INIT;
  while (creating.test_and_set(std::memory_order_acquire)) sched_yield();
  found = current_pool.load(std::memory_order_acquire);
  if (found == nullptr) {
    static std::once_flag hooks;
    std::call_once(hooks, [] {
      pthread_atfork(nullptr, nullptr, forget_pool_in_child);
      std::atexit(stop_thread_pool);
    });
    found = new ThreadPool(num_threads());
    current_pool.store(found, std::memory_order_release);
  }
  creating.clear(std::memory_order_release);
  return found;
}

int count_threads() {
  if (const char* text = std::getenv("AQUA_THREADS")) {
    const int wanted = std::atoi(text);
    if (wanted > 0) return std::min(wanted, 1024);
  }
  cpu_set_t cpus;
  if (sched_getaffinity(0, sizeof(cpus), &cpus) == 0) return std::max(1, CPU_COUNT(&cpus));
  return std::max(1u, std::thread::hardware_concurrency());
}

}  // namespace

int num_threads() {
  static const int threads = count_threads();
  return threads;
}

void parallel_for(int64_t n_tasks, const Function& fn) {
  const bool alone = n_tasks <= 1 || num_threads() == 1 || in_parallel_for ||
                     pool_stopped.load(std::memory_order_relaxed);
  if (!alone && pool()->try_run(n_tasks, fn)) return;
  for (int64_t task = 0; task < n_tasks; ++task) fn(task, 0);
}

void stop_thread_pool() {
  pool_stopped.store(true);
  // Take the pool out first, so that a second call finds nothing to join.
  if (ThreadPool* found = current_pool.exchange(nullptr)) {
    stopped_pool.store(found);
    found->stop();
  }
}

}  // namespace aqua
