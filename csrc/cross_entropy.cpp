#include "cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace clipfast {

namespace {

constexpr index_t kRowsOfPart = 256;

// log(1 + exp z) and its derivative, of one exponential; z is the margin, the negatives' logsumexp less the positive.
class CrossEntropy {
  public:
    CrossEntropy(double negatives, double positive)
        : z_(margin(negatives, positive)), e_(std::exp(-std::fabs(z_))) {}
    double loss() const { return (z_ > 0 ? z_ : 0) + std::log1p(e_); }
    double slope() const { return (z_ > 0 ? 1 : e_) / (1 + e_); }

  private:
    static double margin(double negatives, double positive) {
        // A logit of +inf makes the dense formula NaN (inf - inf).
        constexpr double infinity = std::numeric_limits<double>::infinity();
        const bool infinite = negatives == infinity || positive == infinity;
        return infinite ? std::numeric_limits<double>::quiet_NaN() : negatives - positive;
    }

    double z_, e_;  // a NaN is in both
};

CrossEntropy of_row(const Statistics& of, index_t i) { return {of.row_lse[i], of.positive[i]}; }
CrossEntropy of_col(const Statistics& of, index_t i) { return {of.col_lse[i], of.positive[i]}; }

// Sums go in parts, in one order, whatever the threads do.
index_t parts_of(index_t n) { return (n + kRowsOfPart - 1) / kRowsOfPart; }
template <class Visit>
void for_part(index_t n, index_t part, const Visit& visit) {
    for (index_t i = part * kRowsOfPart; i < std::min(n, (part + 1) * kRowsOfPart); ++i) visit(i);
}

}  // namespace

double symmetric_cross_entropy(const Statistics& of, index_t n) {
    double sum = 0;
    for (index_t part = 0; part < parts_of(n); ++part) {
        double of_part = 0;
        for_part(n, part, [&](index_t i) { of_part += of_row(of, i).loss() + of_col(of, i).loss(); });
        sum += of_part;
    }
    return sum / (2 * double(n));
}

SymmetricCrossEntropy::SymmetricCrossEntropy(const Statistics& of, index_t n, index_t m)
    : n_(n), weights_(2 * n + m), row_(weights_.data()), col_(row_ + n), positive_(col_ + m), of_(of) {}

SymmetricCrossEntropy::SymmetricCrossEntropy(index_t n, index_t m) : SymmetricCrossEntropy(Statistics{}, n, m) {
    statistics_.resize(2 * n + m);
    of_.row_lse = statistics_.data(), of_.col_lse = of_.row_lse + n, of_.positive = of_.col_lse + m;
}

SymmetricCrossEntropy::~SymmetricCrossEntropy() = default;

Weights SymmetricCrossEntropy::weights() const {
    return {of_.row_lse, row_, of_.col_lse, col_, positive_, nullptr, nullptr, of_.kept};
}

Scalars SymmetricCrossEntropy::differentiate(double gradient, Team* team) {
    std::vector<Scalars> parts(parts_of(n_));
    const auto differentiate = [&](int, index_t part) { parts[part] = differentiate_part(gradient, part); };
    if (team) team->for_each(index_t(parts.size()), differentiate);
    else for (index_t part = 0; part < index_t(parts.size()); ++part) differentiate(0, part);
    Scalars sums;
    for (const Scalars& part : parts) sums.loss += part.loss, sums.dbias += part.dbias;
    sums.loss /= 2 * double(n_);
    return sums;
}

Scalars SymmetricCrossEntropy::differentiate_part(double gradient, index_t part) {
    Scalars sums;
    for_part(n_, part, [&](index_t i) {
        const CrossEntropy row = of_row(of_, i), col = of_col(of_, i);
        row_[i] = gradient * row.slope() / (2 * double(n_)), col_[i] = gradient * col.slope() / (2 * double(n_));
        positive_[i] = -(row_[i] + col_[i]);
        sums.loss += row.loss() + col.loss();
        sums.dbias += row_[i] + col_[i] + positive_[i];
    });
    return sums;
}

}  // namespace clipfast
