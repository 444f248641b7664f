// Uninitialized memory, aligned to cache lines.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "block.h"

namespace clipfast {

constexpr std::size_t kLine = 64;

// What a buffer needs beyond the bytes of the parts that are taken from it, for sixteen parts.
constexpr index_t kBufferSlack = 16 * kLine;

// One allocation for all that a pass needs: the allocator keeps one block for the next call, several it would give back.
class Buffer {
  public:
    explicit Buffer(index_t bytes) {
        data_.reset(static_cast<char*>(std::aligned_alloc(kLine, lines(bytes) * kLine)));
        if (!data_) throw std::bad_alloc();
        next_ = data_.get();
    }

    // The next part of the buffer.
    template <class T>
    T* take(index_t size) {
        T* part = reinterpret_cast<T*>(next_);
        next_ += lines(size * sizeof(T)) * kLine;
        return part;
    }

  private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    static std::size_t lines(index_t bytes) { return (bytes + kLine - 1) / kLine; }

    std::unique_ptr<char, Free> data_;
    char* next_;
};

}  // namespace clipfast
