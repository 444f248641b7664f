// The objective that finds the largest logit of each row's and each column's positives.
//
// Included once per instruction set.
#pragma once

#include "chunks.h"

namespace clipfast {
namespace {

// For Kernel::scan. Groups without positives are not formed.
template <class Tiles>
class BestMatches : public Objective {
    using T = typename Tiles::Compute;
    using V = typename Tiles::V;
    static constexpr int W = Tiles::W;
    static constexpr T kInfinity = std::numeric_limits<T>::infinity();

  public:
    BestMatches(const Chunks<Tiles>& chunks, const Matches& out)
        : chunks_(chunks), out_(out), rows_{chunks.panels, chunks.rows}, cols_{chunks.blocks(), chunks.padded_m()} {}

    void place(Buffer& memory) { rows_.place(memory), cols_.place(memory); }
    void begin(Team&) { cols_.fill(-kInfinity); }
    void begin_rows(Team&, index_t, index_t) { rows_.fill(-kInfinity); }

    template <class Group>
    bool wants(const Group& group) const { return group.has_positives() || group.same; }

    template <int NV>
    CLIPFAST_NOINLINE void take(const Group<Tiles, NV>& group, const Place& at) {
        V col_best[NV];
        for (int v = 0; v < NV; ++v) col_best[v] = V{} - kInfinity;
        for (index_t i = 0; i < group.rows; ++i) {
            V row_best = V{} - kInfinity;
            for (int v = 0; v < NV; ++v) {
                const V match = group.own(i, v) | group.duplicates(i, v) ? group.logits(i, v) : V{} - kInfinity;
                row_best = larger(row_best, match);
                col_best[v] = larger(col_best[v], match);
            }
            T& best = *rows_.at(at.panel, at.row + i);
            best = larger_of(best, reduce<T, W>(row_best, [](auto a, auto b) { return larger(a, b); }));
        }
        T* best = cols_.at(at.row / chunks_.block_rows, at.column);
        for (index_t j = 0; j < group.cols; ++j) best[j] = larger_of(best[j], col_best[j / W][j % W]);
    }

    void end_rows(Team&, index_t first, index_t rows) {
        for (index_t i = 0; i < rows; ++i) out_.rows[first + i] = double(rows_.merged(i, larger_of));
    }
    void end(Team&) {
        for (index_t j = 0; j < chunks_.m; ++j) out_.cols[j] = double(cols_.merged(j, larger_of));
    }

  private:
    // NaN wins.
    template <class Vec>
    static CLIPFAST_INLINE Vec larger(Vec a, Vec b) { return (a > b) | (a != a) ? a : b; }
    static T larger_of(T a, T b) { return a > b || a != a ? a : b; }

    Chunks<Tiles> chunks_;
    Matches out_;
    Slots<T> rows_, cols_;
};

}  // namespace
}  // namespace clipfast
