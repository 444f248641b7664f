// Uninitialized memory, aligned to cache lines.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "block.h"

namespace clipfast {

constexpr std::size_t kLine = 64;

// What says how much memory was asked for in vain.
struct OutOfMemory : std::bad_alloc {
    explicit OutOfMemory(index_t bytes) : bytes(bytes) {}
    index_t bytes;
};

// One allocation for all that a pass needs: the allocator keeps one block for the next call, several it would give
// back.
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
        const index_t size = bytes(place);
        buffer.data_.reset(static_cast<char*>(std::aligned_alloc(kLine, size)));
        if (!buffer.data_) throw OutOfMemory(size);
        place(buffer);
        return buffer;
    }

    // The next part, of `size` numbers.
    template <class T>
    T* take(index_t size) {
        T* part = data_ ? reinterpret_cast<T*>(data_.get() + used_) : nullptr;
        used_ += (size * index_t{sizeof(T)} + index_t{kLine} - 1) / index_t{kLine} * index_t{kLine};
        return part;
    }

  private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    Buffer() = default;

    std::unique_ptr<char, Free> data_;
    index_t used_ = 0;
};

}  // namespace clipfast
