// One pool of worker threads for every CPU handler of the process.
//
// XLA runs its thunks on its own threads; a handler that wants more than the thread it was called
// on splits its work here. One pool instead of one per operation (or OpenMP's) keeps the number of
// runnable threads at the number of cores.
#pragma once

#include <cstdint>
#include <functional>

namespace aqua {

// Threads that take part in a parallel_for, the caller included (>= 1): AQUA_THREADS when set,
// otherwise the number of CPUs this process may run on. Read once per process.
int num_threads();

// Runs fn(task, worker) for every task in [0, n_tasks) and returns when all have ended.
//
// Tasks are claimed one by one by the caller (worker 0) and the pool's threads (1 .. num_threads()
// - 1), in ascending order, so put the expensive ones first. `worker` is unique among the threads
// of *this call* only: two concurrent calls may both have a worker 0, so index scratch that belongs
// to the call by it, and use thread_local for scratch that outlives the call.
//
// Safe to call from several threads at once and from inside a task: whoever finds the pool taken
// runs all of its tasks on its own thread. `fn` must not throw.
void parallel_for(int64_t n_tasks, const std::function<void(int64_t task, int worker)>& fn);

// Waits for the workers to end (they finish what they have claimed) and starts none again; calls
// after that run on the calling thread alone. Runs by itself at exit; idempotent.
void stop_thread_pool();

}  // namespace aqua
