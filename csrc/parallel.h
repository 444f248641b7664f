// A team of threads for the length of one call. Which thread takes which task is left to chance; results do not depend on it,
// because every number has one writer and a fixed order of sums.
#pragma once

#include <atomic>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#include "block.h"

namespace clipfast {

class Team {
  public:
    explicit Team(int threads) {
        try {
            for (int worker = 1; worker < threads; ++worker) others_.emplace_back([this, worker] { work(worker); });
        } catch (const std::system_error&) {
            // The system gives no more threads: those that run, this one included, take all tasks.
        }
    }
    ~Team() {
        if (others_.empty()) return;
        job_ = nullptr;
        generation_.fetch_add(1, std::memory_order_release);
        for (auto& other : others_) other.join();
    }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    // Calls task(worker, index) for every index in [0, tasks); worker < threads numbers the thread that runs it.
    void for_each(index_t tasks, const std::function<void(int, index_t)>& task) {
        if (others_.empty() || tasks == 1) {
            for (index_t i = 0; i < tasks; ++i) task(0, i);
            return;
        }
        job_ = &task;
        tasks_ = tasks;
        next_.store(0, std::memory_order_relaxed);
        busy_.store(static_cast<int>(others_.size()), std::memory_order_relaxed);
        generation_.fetch_add(1, std::memory_order_release);
        take_tasks(0);
        wait([this] { return busy_.load(std::memory_order_acquire) == 0; });
    }

  private:
    void work(int worker) {
        for (unsigned seen = 0;; ++seen) {
            wait([&] { return generation_.load(std::memory_order_acquire) != seen; });
            if (!job_) return;
            take_tasks(worker);
            busy_.fetch_sub(1, std::memory_order_release);
        }
    }

    void take_tasks(int worker) {
        for (index_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) (*job_)(worker, i);
    }

    // Phases follow each other within microseconds, so a thread asks again before it gives its processor away.
    template <class Ready>
    static void wait(const Ready& ready) {
        for (int i = 0; !ready(); ++i)
            if (i > kSpins) std::this_thread::yield();
    }

    static constexpr int kSpins = 2000;

    std::vector<std::thread> others_;
    const std::function<void(int, index_t)>* job_ = nullptr;
    index_t tasks_ = 0;
    std::atomic<index_t> next_{0};
    std::atomic<int> busy_{0};
    std::atomic<unsigned> generation_{0};
};

}  // namespace clipfast
