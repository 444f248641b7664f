// Uninitialized memory, aligned to cache lines.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include "block.h"

namespace clipfast {

constexpr std::size_t kLine = 64;
constexpr std::uintptr_t kHugePage = 2 << 20;

// Asks for huge pages where whole ones lie in fresh memory: one fault instead of 512, and fewer misses of the table that
// translates addresses.
inline void ask_for_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] index_t bytes) {
#ifdef __linux__
    const auto address = reinterpret_cast<std::uintptr_t>(memory);
    const auto begin = (address + kHugePage - 1) / kHugePage * kHugePage;
    const auto end = (address + std::uintptr_t(bytes)) / kHugePage * kHugePage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// What says how much memory was asked for in vain.
struct OutOfMemory : std::bad_alloc {
    explicit OutOfMemory(index_t bytes) : bytes(bytes) {}
    index_t bytes;
};

// One allocation for all that a pass needs. The last one of up to kSpareBytes is kept for the next pass: fresh memory
// costs a fault every 4 KiB, up to a tenth of the pass.
//
// place(buffer) takes the parts. It is called twice, first to count them, so what a pass holds is what it says it
// holds.
class Buffer {
  public:
    template <class Place>
    static index_t bytes(const Place& place) {
        Buffer count;
        place(count);
        return count.used_;
    }

    template <class Place>
    static Buffer holding(const Place& place) {
        Buffer buffer;
        buffer.memory_.reset(Memory::of(bytes(place)));
        place(buffer);
        return buffer;
    }

    // Gives back what is kept for the next pass.
    static void release() { std::free(Memory::spare_.exchange(nullptr)); }

    // The next part, of `size` numbers.
    template <class T>
    T* take(index_t size) {
        char* const part = memory_ ? memory_->begin() + used_ : nullptr;
        const index_t bytes = size * index_t{sizeof(T)};
        const index_t end = (bytes + index_t{kLine} - 1) / index_t{kLine} * index_t{kLine} + kGap;
#ifdef __SANITIZE_ADDRESS__
        if (part) __asan_poison_memory_region(part + bytes, end - bytes);
#endif
        used_ += end;
        return reinterpret_cast<T*>(part);
    }

    // The next parts twice, for two uses that do not meet: what either lambda takes begins in one place.
    template <class First, class Second>
    void share(const First& first, const Second& second) {
        const index_t begin = used_;
        first();
        const index_t end = kGap ? used_ : std::exchange(used_, begin);
        second();
        used_ = std::max(used_, end);
    }

  private:
#ifdef __SANITIZE_ADDRESS__
    // It sees the ends of what is allocated, and of the parts.
    static constexpr index_t kSpareBytes = 0, kGap = kLine;
#else
    static constexpr index_t kSpareBytes = 128 << 20, kGap = 0;
#endif

    struct Memory {
        index_t size;

        static Memory* of(index_t size) {
            Memory* const spare = spare_.exchange(nullptr);
            if (spare && spare->size >= size) return spare;
            std::free(spare);
            void* const fresh = std::aligned_alloc(kLine, kLine + size);
            if (!fresh) throw OutOfMemory(size);
            ask_for_huge_pages(fresh, size);
            return new (fresh) Memory{size};
        }
        char* begin() { return reinterpret_cast<char*>(this) + kLine; }

        inline static std::atomic<Memory*> spare_{nullptr};
    };
    struct Release {
        void operator()(Memory* memory) const {
            std::free(memory->size > kSpareBytes ? memory : Memory::spare_.exchange(memory));
        }
    };
    Buffer() = default;

    std::unique_ptr<Memory, Release> memory_;
    index_t used_ = 0;
};

}  // namespace clipfast
