// How a block of logits is divided, and a block's rows packed for the product x y^T, a chunk at a time.
//
// The logits go in chunks, a chunk in panels of kWidth columns, a panel in groups of up to kGroup rows. A task forms
// the groups of a few panels and rows; its left operand stays in the second-level cache (kBlockBytes), so that what it
// reads from beyond is a small part of what it computes.
//
// Included once per instruction set.
#pragma once

#include "logits.h"
#include "parallel.h"

namespace clipfast {
namespace {

constexpr index_t kChunkRows = 4096;         // at most
constexpr index_t kChunkBytes = 16 << 20;    // of G, about
constexpr index_t kBlockBytes = 512 << 10;   // of a task's left operand, at most
constexpr index_t kBlockRows = 256;          // of a task, at most
constexpr index_t kTasksPerThread = 4;       // at least, where there is so much to do
constexpr index_t kTasks = 16;               // that form logits, at least, where there is so much to do
constexpr index_t kPackedRows = 16;          // of a task that packs them for the left
constexpr double kFlopsPerThread = 1e6;  // below it a thread costs more than it brings

// Numbers that several tasks add to or compare with, each in a slot of its own; the slots are merged in their order.
template <class N>
struct Slots {
    index_t slots, length;
    N* data = nullptr;

    void place(Buffer& memory) { data = memory.take<N>(slots * length); }
    void fill(N value) { std::fill(data, data + slots * length, value); }
    N* at(index_t slot, index_t i) const { return data + slot * length + i; }
    template <class Combine>
    N merged(index_t i, const Combine& combine) const {
        N total = data[i];
        for (index_t slot = 1; slot < slots; ++slot) total = combine(total, *at(slot, i));
        return total;
    }
};

template <class N>
N sum_of(N a, N b) { return a + b; }

// Where a group of logits lies.
struct Place {
    int worker;      // the thread that forms it
    index_t first;   // the chunk's first row
    index_t row;     // the group's first row, in the chunk
    index_t panel;   // in the chunk
    index_t column;  // the group's first column, in the block
};

// What an objective may hear of a pass: when the pass begins, where it is, and when it ends.
struct Objective {
    void begin(Team&) {}
    void begin_rows(Team&, index_t /*first*/, index_t /*rows*/) {}
    void begin_cols(Team&, index_t /*column*/, index_t /*cols*/) {}
    void end_rows(Team&, index_t /*first*/, index_t /*rows*/) {}
    void end(Team&) {}
};

// How a block is divided.
template <class Tiles>
struct Chunks {
    static constexpr index_t kWidth = Tiles::kWidth;
    static_assert(kBlockRows % kGroup == 0);

    Chunks(const Block& block, int most_threads)
        : n(block.n()),
          m(block.m()),
          diag_offset(block.diag_offset),
          row_ids(block.row_ids),
          col_ids(block.col_ids),
          ignores_same_ids(block.ignores_same_ids),
          threads(int(std::clamp(2.0 * double(n) * double(m) * double(block.d()) / kFlopsPerThread, 1.0,
                                 std::max(1.0, double(most_threads))))),
          rows(round_up(std::min(n, kChunkRows), kGroup)),
          cols(std::min(round_up(m, kWidth),
                        round_up(kChunkBytes / (rows * index_t{sizeof(typename Tiles::Compute)}), kWidth))),
          panels(cols / kWidth),
          rows_held(std::min(n, rows)),
          cols_held(std::min(m, cols)) {
        const index_t row_bytes = Tiles::operands(block.d()) * index_t{sizeof(typename Tiles::Operand)};
        // Of the shapes alone: columns are added up per block of rows.
        const index_t share = round_up(ceil_div(rows * panels, kTasks), kGroup);
        block_rows = std::clamp(std::min(kBlockBytes / row_bytes / kGroup * kGroup, share), kGroup, kBlockRows);
    }

    index_t blocks() const { return ceil_div(rows, block_rows); }  // of a chunk
    index_t padded_m() const { return round_up(m, kWidth); }

    // In how many parts to do what `blocks` tasks would do, so that there are tasks for all threads.
    index_t parts(index_t blocks, index_t most) const {
        return std::clamp(ceil_div(kTasksPerThread * threads, blocks), index_t{1}, most);
    }

    // Calls visit(group without its logits, place) for all groups of the chunk at (first, column).
    template <class Visit>
    void for_groups(Team& team, index_t first, index_t column, const Visit& visit) const {
        const index_t rows_here = std::min(rows, n - first), cols_here = std::min(cols, m - column);
        const index_t panels_here = ceil_div(cols_here, kWidth), blocks = ceil_div(rows_here, block_rows);
        const index_t share = ceil_div(panels_here, parts(blocks, panels_here));
        team.for_each(blocks * ceil_div(panels_here, share), [&](int worker, index_t task) {
            [[maybe_unused]] const typename Tiles::Session session;
            const index_t row = task % blocks * block_rows, begin = task / blocks * share;
            for (index_t panel = begin; panel < std::min(panels_here, begin + share) && !team.stopped(); ++panel) {
                const index_t at = panel * kWidth, count = std::min(kWidth, cols_here - at);
                Tiles::with_vectors(count, [&](auto vectors) {
                    for (index_t r = row; r < std::min(rows_here, row + block_rows); r += kGroup) {
                        Group<Tiles, vectors.value> group(std::min(kGroup, rows_here - r), count,
                                                          first + r + diag_offset - column - at);
                        if (row_ids) group.set_ids(row_ids + first + r, col_ids + column + at, ignores_same_ids);
                        visit(group, Place{worker, first, r, panel, column + at});
                    }
                });
            }
        });
    }

    index_t n, m, diag_offset;
    const std::int32_t *row_ids, *col_ids;
    bool ignores_same_ids;
    int threads;
    index_t rows, cols;  // of a chunk, multiples of kGroup and kWidth
    index_t panels;      // of a chunk
    index_t rows_held, cols_held;  // of the largest chunk, without what the multiples add
    index_t block_rows;  // of a task that forms logits
};

// The logits of a block that one pass keeps and another takes up: panels of [n][kWidth] behind a head that says how wide
// the panels are, for another instruction set may take them up, and cannot.
template <class Tiles>
class Kept {
    using T = typename Tiles::Compute;
    static constexpr index_t kWidth = Tiles::kWidth;
    static_assert(kWidth <= kKeptPadding);

  public:
    // For the pass that keeps them; `memory` may be null. What no logit takes is zero.
    static Kept begun(void* memory, index_t n, index_t m) {
        T* const all = static_cast<T*>(memory);
        if (all) {
            ask_for_huge_pages(all, kept_size(n, m) * index_t{sizeof(T)});
            std::fill(all, all + kKeptHead, T(0));
            all[0] = T(kWidth);
            std::fill(all + kKeptHead + n * round_up(m, kWidth), all + kept_size(n, m), T(0));
        }
        return Kept(all, n);
    }
    // For the one that takes them up, if it can.
    static Kept found(const void* memory, index_t n) {
        T* const all = static_cast<T*>(const_cast<void*>(memory));
        return Kept(all && all[0] == T(kWidth) ? all : nullptr, n);
    }

    explicit operator bool() const { return logits_; }
    index_t rows() const { return n_; }
    T* at(index_t row, index_t column) const { return logits_ + (column * n_ + row * kWidth); }
    T* at(const Place& place) const { return at(place.first + place.row, place.column); }

    // Whether a group can be formed where it is kept: it may be written up to a multiple of kRows.
    template <int NV>
    bool holds(const Group<Tiles, NV>& group) const {
        return logits_ && n_ % Tiles::kRows == 0 && group.cols == kWidth;
    }
    template <int NV>
    void keep(const Group<Tiles, NV>& group, const Place& place) const {
        T* const to = at(place);
        std::memcpy(to, group.s, group.rows * kWidth * sizeof(T));
        if constexpr (NV < Tiles::kVectors)
            for (index_t i = 0; i < group.rows; ++i)
                std::fill(to + i * kWidth + NV * Tiles::W, to + (i + 1) * kWidth, T(0));
    }

  private:
    Kept(T* all, index_t n) : logits_(all ? all + kKeptHead : nullptr), n_(n) {}

    T* logits_;
    index_t n_;
};

// A block's rows of a chunk as operands of x y^T, and the logits formed of them.
template <class Tiles, class Element>
class PackedRows {
    using Operand = typename Tiles::Operand;
    static constexpr index_t kWidth = Tiles::kWidth;

  public:
    explicit PackedRows(const Block& block)
        : block_(block),
          row_size_(Tiles::operands(block.d())),
          logits_(block),
          as_they_lie_(block.n() % Tiles::kRows == 0 && Tiles::template is_left<Element>(block.x)),
          x_stride_(as_they_lie_ ? block.x.row_stride / Tiles::kTerms : row_size_) {}

    void place(Buffer& memory, const Chunks<Tiles>& chunks) {
        if (!as_they_lie_) x_packed_ = memory.take<Operand>(round_up(chunks.rows_held, Tiles::kRows) * row_size_);
        y_ = memory.take<Operand>(round_up(chunks.cols_held, Tiles::W) * row_size_);
    }

    // Makes rows of x the left operand.
    void take_left(Team& team, index_t first, index_t rows) {
        x_ = as_they_lie_ ? static_cast<const Operand*>(block_.x.data) + first * x_stride_ : x_packed_;
        if (as_they_lie_) return;
        constexpr index_t step = round_up(kPackedRows, Tiles::kRows);
        team.for_each(ceil_div(rows, step), [&](int, index_t task) {
            const index_t row = task * step, count = std::min(step, rows - row);
            Tiles::template pack_left<Element>(block_.x, first + row, count, x_packed_ + row * row_size_);
        });
    }

    // A panel after the other.
    void pack_right(Team& team, index_t column, index_t cols) const {
        team.for_each(ceil_div(cols, kWidth), [&](int, index_t panel) {
            const index_t first = panel * kWidth, count = std::min(kWidth, cols - first);
            Tiles::with_vectors(count, [&](auto vectors) {
                Tiles::template pack_right<Element, vectors.value>(block_.y, column + first, count,
                                                                   y_ + first * row_size_);
            });
        });
    }

    template <class Group>
    void form(Group& group, const Place& at) const {
        logits_.form(group, x_ + at.row * x_stride_, x_stride_, y_ + at.panel * kWidth * row_size_);
    }

    const Logits<Tiles>& logits() const { return logits_; }

  private:
    Block block_;
    index_t row_size_;  // operands per row
    Logits<Tiles> logits_;
    bool as_they_lie_;  // whether x is taken in place
    index_t x_stride_;  // of the operands x_
    const Operand* x_ = nullptr;
    Operand *x_packed_ = nullptr, *y_ = nullptr;
};

}  // namespace
}  // namespace clipfast
