// Tasks over a few threads. Which thread takes which task is left to chance; results do not depend on it, because every
// number has one writer and a fixed order of sums.
#pragma once

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
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

// At most so many threads that take the tasks of a pass's loops between them. They come once for the whole pass, and wait
// for its next loop by spinning: a pass over a small batch has a dozen loops of a few microseconds each.
class Team {
  public:
    explicit Team(const Execution& execution)
        : threads_(execution.threads), interrupted_(execution.interrupted), openmp_(loaded_openmp()) {}

    // Runs the pass in this thread, whose loops the others help with.
    void run(const std::function<void()>& pass) {
        if (threads_ <= 1) return pass();
        pass_ = &pass;
        if (openmp_) openmp_([](void* team) { static_cast<Team*>(team)->take_part(); }, this, threads_, 0);
        else run_in_threads();
        if (error_) std::rethrow_exception(error_);
    }

    // Calls task(worker, index) for every index in [0, tasks); worker < threads numbers the thread that runs it.
    void for_each(index_t tasks, const std::function<void(int, index_t)>& task) {
        Loop loop{tasks, task};
        if (tasks > 1) loop_.store(&loop);
        take(loop, 0);
        for (Spin spin; helping_.load() > 0; stopped()) spin.wait();
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
        const index_t tasks;
        const std::function<void(int, index_t)>& task;
        std::atomic<index_t> next{0};
    };

    // Waits; after about 100 microseconds it leaves the processor to others that want it.
    class Spin {
      public:
        void wait() {
            if (++turns_ > kTurns) std::this_thread::yield();
            else pause();
        }

      private:
        static constexpr int kTurns = 2000;
        static void pause() {
#ifdef __x86_64__
            __builtin_ia32_pause();
#endif
        }
        int turns_ = 0;
    };

    void take(Loop& loop, int worker) {
        for (index_t i; !stopped() && (i = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.tasks;)
            loop.task(worker, i);
        loop_.store(nullptr);  // nothing is left to come for
    }

    // Takes tasks until the pass is over. A loop ends when no helper is in one, so a helper that has said that it comes
    // finds the loop that there is, or none.
    void help() {
        const int worker = helpers_.fetch_add(1, std::memory_order_relaxed) + 1;
        for (Spin spin; !over_.load(std::memory_order_acquire); spin.wait()) {
            if (!loop_.load(std::memory_order_relaxed)) continue;
            helping_.fetch_add(1);
            if (Loop* const loop = loop_.load()) take(*loop, worker);
            helping_.fetch_sub(1);
            spin = {};
        }
    }

    // No exception may pass through OpenMP.
    void take_part() {
        if (std::this_thread::get_id() != caller_) return help();
        try {
            (*pass_)();
        } catch (...) {
            error_ = std::current_exception();
        }
        over_.store(true, std::memory_order_release);
    }

    void run_in_threads() {
        std::vector<std::thread> others;
        others.reserve(threads_ - 1);
        try {
            for (int i = 1; i < threads_; ++i) others.emplace_back([this] { help(); });
        } catch (const std::system_error&) {
            // The system gives no more threads: those that run, this one included, take all tasks.
        }
        take_part();
        for (auto& other : others) other.join();
    }

    const int threads_;
    bool (*const interrupted_)();
    const OpenMP openmp_;
    const std::thread::id caller_ = std::this_thread::get_id();
    Clock::time_point asked_ = Clock::now();  // the caller's thread alone reads and writes it
    std::atomic<bool> stopped_{false}, over_{false};
    std::atomic<Loop*> loop_{nullptr};  // whose tasks are to be taken
    std::atomic<int> helpers_{0}, helping_{0};
    const std::function<void()>* pass_ = nullptr;
    std::exception_ptr error_;
};

}  // namespace clipfast
