// Fixed tasks over a few threads. Every output has one writer and a fixed order of sums, so results do not depend on
// which thread takes which task, nor on how many threads there are.
#pragma once

#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "block.h"

namespace clipfast {

// Calls task(worker, index) for every index in [0, tasks); worker < threads numbers the thread that runs it.
template <class Task>
void parallel_for(int threads, index_t tasks, const Task& task) {
    const int workers = static_cast<int>(std::min<index_t>(threads, tasks));
    if (workers <= 1) {
        for (index_t i = 0; i < tasks; ++i) task(0, i);
        return;
    }
    std::atomic<index_t> next{0};
    const auto work = [&](int worker) {
        for (index_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(worker, i);
    };
    std::vector<std::thread> others;
    others.reserve(workers - 1);
    try {
        for (int worker = 1; worker < workers; ++worker) others.emplace_back(work, worker);
    } catch (const std::system_error&) {
        // The system gives no more threads: those that run, this one included, take all tasks.
    }
    work(0);
    for (auto& other : others) other.join();
}

}  // namespace clipfast
