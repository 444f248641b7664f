// Tasks over a few threads. Which thread takes which task is left to chance; results do not depend on it, because every
// number has one writer and a fixed order of sums.
#pragma once

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#include "block.h"

namespace clipfast {

// On how many threads a pass runs, and whom its caller's thread asks now and then whether to give it up.
struct Execution {
    int threads;
    bool (*interrupted)() = nullptr;
};

// What a pass that was given up throws, in the caller's thread, after all others have left it.
struct Interrupted {};

// GNU OpenMP's entry point, which LLVM's and Intel's offer too: run(data) in each of `threads` threads.
using OpenMP = void (*)(void (*run)(void*), void* data, unsigned threads, unsigned flags);

inline const pid_t kLoadedIn = getpid();

// The OpenMP that PyTorch has loaded, or null. Its threads wait for work by spinning, so threads beside them would have
// to share the processors; and they are there already. A forked child has none of its parent's threads.
inline OpenMP loaded_openmp() {
    static const auto entry = reinterpret_cast<OpenMP>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return getpid() == kLoadedIn ? entry : nullptr;
}

// At most so many threads that take the tasks of a loop between them.
class Team {
  public:
    explicit Team(const Execution& execution)
        : threads_(execution.threads), interrupted_(execution.interrupted), openmp_(loaded_openmp()) {}

    // Calls task(worker, index) for every index in [0, tasks); worker < threads numbers the thread that runs it.
    void for_each(index_t tasks, const std::function<void(int, index_t)>& task) {
        Loop loop{*this, tasks, task};
        const auto workers = static_cast<int>(std::min<index_t>(threads_, tasks));
        if (workers <= 1) loop.run();
        else if (openmp_) openmp_([](void* data) { static_cast<Loop*>(data)->run(); }, &loop, workers, 0);
        else run_in_threads(loop, workers);
        if (stopped_) throw Interrupted{};
    }

    // Whether the pass is given up. Every loop asks between its tasks; a task of more than a tenth of a second asks
    // too.
    bool stopped() {
        if (interrupted_ && std::this_thread::get_id() == caller_) {
            const auto now = Clock::now();
            if (now - asked_ > kPatience) {
                if (interrupted_()) stopped_.store(true, std::memory_order_relaxed);
                asked_ = now;
            }
        }
        return stopped_.load(std::memory_order_relaxed);
    }

  private:
    using Clock = std::chrono::steady_clock;
    static constexpr auto kPatience = std::chrono::milliseconds(100);

    struct Loop {
        Team& team;
        const index_t tasks;
        const std::function<void(int, index_t)>& task;
        std::atomic<index_t> next{0};
        std::atomic<int> workers{0};

        void run() {
            const int worker = workers.fetch_add(1, std::memory_order_relaxed);
            for (index_t i; !team.stopped() && (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
                task(worker, i);
        }
    };

    static void run_in_threads(Loop& loop, int workers) {
        std::vector<std::thread> others;
        others.reserve(workers - 1);
        try {
            for (int i = 1; i < workers; ++i) others.emplace_back([&loop] { loop.run(); });
        } catch (const std::system_error&) {
            // The system gives no more threads: those that run, this one included, take all tasks.
        }
        loop.run();
        for (auto& other : others) other.join();
    }

    const int threads_;
    bool (*const interrupted_)();
    const OpenMP openmp_;
    const std::thread::id caller_ = std::this_thread::get_id();
    Clock::time_point asked_ = Clock::now();  // the caller's thread alone reads and writes it
    std::atomic<bool> stopped_{false};
};

}  // namespace clipfast
