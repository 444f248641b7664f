// The sigmoid objective: the loss of every pair by itself, and its gradient in the same pass.
//
// Included once per instruction set.
#pragma once

#include "chunks.h"

namespace clipfast {
namespace {

// For Kernel::scan, and Kernel::differentiate where gradients are wanted.
template <class Tiles>
class Sigmoid : public Objective {
    using T = typename Tiles::Compute;
    using V = typename Tiles::V;
    static constexpr int W = Tiles::W;

  public:
    Sigmoid(const Chunks<Tiles>& chunks, const Logits<Tiles>& logits, double unit, double* row_loss)
        : chunks_(chunks),
          bias_(logits.bias()),
          unit_(T(unit)),
          row_loss_(row_loss),
          loss_{chunks.panels, chunks.rows},
          sum_{chunks.panels, chunks.rows / kGroup} {}

    void place(Buffer& memory) { loss_.place(memory), sum_.place(memory); }
    void begin_rows(Team&, index_t, index_t) { loss_.fill(0), sum_.fill(0); }

    template <class Group>
    bool wants(const Group&) const { return true; }
    template <int NV>
    CLIPFAST_NOINLINE void take(const Group<Tiles, NV>& group, const Place& at) { replace<false>(group, at); }
    template <int NV>
    CLIPFAST_NOINLINE T to_gradient(const Group<Tiles, NV>& group, const Place& at) {
        return replace<true>(group, at);
    }

    void end_rows(Team&, index_t first, index_t rows) {
        for (index_t i = 0; i < rows; ++i) row_loss_[first + i] = loss_.merged(i, sum_of<double>);
        for (index_t group = 0; group < ceil_div(rows, kGroup); ++group) dbias_ += sum_.merged(group, sum_of<double>);
    }
    double dbias() const { return dbias_; }

  private:
    template <bool gradient, int NV>
    CLIPFAST_INLINE T replace(const Group<Tiles, NV>& group, const Place& at) {
        const V unit = V{} + unit_, bias = V{} + bias_;
        const bool plain = group.is_plain();
        V dot = {}, sum = {};
        for (index_t i = 0; i < group.rows; ++i) {
            V loss = {};
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
                const V logit = group.logits(i, v);
                const V by_label = plain ? logit : labelled(group, logit, i, v);
                const auto [softplus, sigmoid] = softplus_and_sigmoid<T, W>(by_label);
                loss += softplus;
                if constexpr (!gradient) continue;
                V g = unit * sigmoid;
                if (!plain) g = positives(group, i, v) ? -g : g;
                sum += g;
                // What is left out has no part in it, whatever its logit.
                if constexpr (Tiles::kRounds) dot += g == 0 ? V{} : g * (logit - bias);
                store_vector(group.row(i) + v * W, g);
            }
            *loss_.at(at.panel, at.row + i) += reduce<T, W>(loss, [](auto a, auto b) { return a + b; });
        }
        *sum_.at(at.panel, at.row / kGroup) += reduce<T, W>(sum, [](auto a, auto b) { return a + b; });
        return reduce<T, W>(dot, [](auto a, auto b) { return a + b; });
    }

    template <int NV>
    static CLIPFAST_INLINE auto positives(const Group<Tiles, NV>& group, index_t i, int v) {
        return group.ignores ? group.own(i, v) : group.own(i, v) | group.duplicates(i, v);
    }

    // -label * logit, -inf where there is no label: its loss and gradient are 0.
    template <int NV>
    static CLIPFAST_INLINE V labelled(const Group<Tiles, NV>& group, V logit, index_t i, int v) {
        const V negated = positives(group, i, v) ? -logit : V{} - std::numeric_limits<T>::infinity();
        return group.negatives(i, v) ? logit : negated;
    }

    Chunks<Tiles> chunks_;
    T bias_, unit_;
    double* row_loss_;
    Slots<double> loss_;  // of a row per panel of a chunk
    Slots<double> sum_;   // of G, of a group per panel of a chunk
    double dbias_ = 0;
};

}  // namespace
}  // namespace clipfast
