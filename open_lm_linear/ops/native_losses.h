// Cross entropy and divergence of whole rows of logits, which become the gradient by them. A row is read once from
// memory: what it takes several passes for stays in the cache.

#pragma once

#include <algorithm>
#include <cmath>

#include "native_lanes.h"

namespace {

template <class X>
struct Softmax {  // of a row: exp(x - top) / total
    float top, total;
    Softmax(const X* x, long n) : top(widen(x[0])), total(0) {
        Lanes most = {}, sum = {};
        most += top;
        long i = 0;
        for (; i + LANES <= n; i += LANES) {
            const Lanes now = load(x + i);
            most = most < now ? now : most;
        }
        for (long j = 0; j < LANES; j++) top = std::max(top, most[j]);
        for (; i < n; i++) top = std::max(top, widen(x[i]));
        for (i = 0; i + LANES <= n; i += LANES) sum += exponential(load(x + i) - top);
        total = ::total(sum);
        for (; i < n; i++) total += std::exp(widen(x[i]) - top);
    }
    float log_total() const { return top + std::log(total); }
    Lanes at(const X* x, float factor) const { return exponential(load(x) - top) * (factor / total); }
    float one(const X* x, float factor) const { return std::exp(widen(*x) - top) * (factor / total); }
};

// sums: the cross entropy of the row, and with z-loss; x becomes the gradient of the second if it is wanted.
template <class X>
void entropy_of(X* x, long n, long target, double z_loss, bool gradient, double* sums) {
    const Softmax<X> q(x, n);
    const float log_z = q.log_total();
    sums[0] = double(log_z) - widen(x[target]);
    sums[1] = sums[0] + z_loss * log_z * log_z;
    if (!gradient) return;
    const float factor = float(1 + 2 * z_loss * log_z), at_target = q.one(x + target, factor) - 1;
    long i = 0;
    for (; i + LANES <= n; i += LANES) store(q.at(x + i, factor), x + i);
    for (; i < n; i++) narrow(q.one(x + i, factor), x + i);
    narrow(at_target, x + target);
}

// sums: cross entropy, divergence of q from the teacher's p, and ce times the first and kl times the second; x becomes
// the gradient of the last if it is wanted.
template <class X>
void divergence_of(X* x, const X* teacher, long n, long target, double ce, double kl, bool gradient, double* sums) {
    const Softmax<X> q(x, n), p(teacher, n);
    Lanes apart = {};
    float rest = 0;
    long i = 0;
    for (; i + LANES <= n; i += LANES) apart += p.at(teacher + i, 1) * (load(teacher + i) - load(x + i));
    for (; i < n; i++) rest += p.one(teacher + i, 1) * (widen(teacher[i]) - widen(x[i]));
    sums[0] = double(q.log_total()) - widen(x[target]);
    sums[1] = double(total(apart)) + rest + q.log_total() - p.log_total();  // sum p (log p - log q)
    sums[2] = ce * sums[0] + kl * sums[1];
    if (!gradient) return;
    const float ours = float(ce + kl), theirs = float(kl);
    const float at_target = q.one(x + target, ours) - p.one(teacher + target, theirs) - float(ce);
    for (i = 0; i + LANES <= n; i += LANES) store(q.at(x + i, ours) - p.at(teacher + i, theirs), x + i);
    for (; i < n; i++) narrow(q.one(x + i, ours) - p.one(teacher + i, theirs), x + i);
    narrow(at_target, x + target);
}

// `of(row, target, sums)` of every row that has a target, by all threads; 1 where a target is no token.
template <class Of>
int rows_of_loss(const int64_t* targets, long rows, long n, long kinds, double* sums, long threads, const Of& of) {
    constexpr long IGNORED = -100;
    for (long r = 0; r < rows; r++)
        if (targets[r] != IGNORED && (targets[r] < 0 || targets[r] >= n)) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long r = 0; r < rows; r++) {
        std::fill_n(sums + r * kinds, kinds, 0.0);
        of(r, targets[r] == IGNORED ? -1 : long(targets[r]), sums + r * kinds);
    }
    return 0;
}

template <class X>
int entropies(X* x, const int64_t* targets, long rows, long n, double z_loss, bool gradient, double* sums,
              long threads) {
    return rows_of_loss(targets, rows, n, 2, sums, threads, [=](long r, long target, double* of_row) {
        if (target >= 0) return entropy_of(x + r * n, n, target, z_loss, gradient, of_row);
        if (gradient) std::fill_n(x + r * n, n, X{});
    });
}

template <class X>
int divergences(X* x, const X* teacher, const int64_t* targets, long rows, long n, double ce, double kl, bool gradient,
                double* sums, long threads) {
    return rows_of_loss(targets, rows, n, 3, sums, threads, [=](long r, long target, double* of_row) {
        if (target >= 0) return divergence_of(x + r * n, teacher + r * n, n, target, ce, kl, gradient, of_row);
        if (gradient) std::fill_n(x + r * n, n, X{});
    });
}

}  // namespace
