// One token of a few sequences on a CPU, through blocks of linear attention or a whole model of them; products of a
// matrix and a few rows; losses; and what training has between its products. `native.py` builds this file, fills in the
// structs, and gives the pointers.

#include <omp.h>

#include "native_block.h"
#include "native_losses.h"
#include "native_pointwise.h"

namespace {

// What a call's memory holds: the residual stream twice, one normed copy a thread, and what the largest block needs.
struct Memory {
    long stream, blocks, size;
    Memory(const Call& c) : stream(c.rows * c.dim), blocks((2 + c.threads) * stream), size(0) {
        for (long i = 0; i < c.layers; i++) {
            const Block& b = *c.layer[i].block;
            size = std::max(size, Layout(b).size(b, c.rows, c.threads));
        }
        size += blocks;
    }
};

float embedded(const Call& c, long row, long i) {
    const long at = c.ids[row] * c.dim + i;
    if (!c.embedding.bfloat16) return static_cast<const float*>(c.embedding.w)[at] * float(c.embedding_scale);
    Bfloat16 x;
    narrow(widen(static_cast<const Bfloat16*>(c.embedding.w)[at]) * float(c.embedding_scale), &x);
    return widen(x);  // rounded as the model's embeddings are
}

template <class X>
void stream_of(const Call& c, float* stream) {
    for (long i = 0; i < c.rows * c.dim; i++) stream[i] = widen(static_cast<const X*>(c.x)[i]);
}

template <class X>
void stream_to(const Call& c, const float* stream, Share share) {
    for (long i = share.begin(c.rows * c.dim); i < share.end(c.rows * c.dim); i++)
        narrow(stream[i], static_cast<X*>(c.y) + i);
}

void run(const Call& c, Share share) {
    const Memory at(c);
    float *stream = c.memory, *next = stream + at.stream, *normed = next + (1 + share.index) * at.stream;
    if (share.index == 0 && !c.ids) (c.bfloat16 ? stream_of<Bfloat16> : stream_of<float>)(c, stream);
    if (share.index == 0 && c.ids)
        for (long r = 0; r < c.rows; r++) {
            for (long i = 0; i < c.dim; i++) stream[r * c.dim + i] = embedded(c, r, i);
            normalise(c.after_embedding, stream + r * c.dim, stream + r * c.dim, c.dim);
        }
#pragma omp barrier
    for (long i = 0; i < c.layers; i++, std::swap(stream, next)) {
        Step(c, c.layer[i], stream, next, c.memory + at.blocks, share).run();
#pragma omp barrier
    }
    if (!c.ids) return (c.bfloat16 ? stream_to<Bfloat16> : stream_to<float>)(c, stream, share);
    for (long r = 0; r < c.rows; r++) normalise(c.before_head, stream + r * c.dim, normed + r * c.dim, c.dim);
    const long first = share.begin(c.head.out), count = share.size(c.head.out);
    product(c.head, first, count, normed, c.dim, c.logits + first, c.head.out, c.rows);
}

template <class X>
void products(const Matrix& m, long rows, const X* x, X* y, float* memory, long threads) {
#pragma omp parallel num_threads(threads)
    {
        const Share share{omp_get_thread_num(), omp_get_num_threads()};
        const long first = share.begin(m.out), count = share.size(m.out);
        float* out = memory + rows * first;  // this thread's outputs, row behind row
        float* in = memory + rows * (m.out + share.index * m.in);
        for (long i = 0; i < rows * m.in; i++) in[i] = widen(x[i]);
        product(m, first, count, in, m.in, out, count, rows);
        for (long r = 0; r < rows; r++)
            for (long o = 0; o < count; o++) narrow(out[r * count + o], y + r * m.out + first + o);
    }
}

}  // namespace

extern "C" {

// Floats that `memory` must have.
int64_t token_memory(const Call* c) { return Memory(*c).size; }

// A token of each row through the blocks, or through the model; 1 where an id is outside of the vocabulary.
int token_step(const Call* c) {
    for (long r = 0; c->ids && r < c->rows; r++)
        if (c->ids[r] < 0 || c->ids[r] >= c->embedding.out) return 1;
    for (long r = 0; c->next_positions && r < (c->position_stride ? c->rows : 1); r++)
        c->next_positions[r] = c->positions[r] + 1;
#pragma omp parallel num_threads(c->threads)
    run(*c, Share{omp_get_thread_num(), omp_get_num_threads()});
    return 0;
}

// y (rows, out) = x W^T + b of x (rows, in); memory: rows * (out + threads * in) floats.
void few_rows(const Matrix* m, int64_t rows, const void* x, void* y, float* memory, int64_t threads, int64_t bfloat16) {
    if (bfloat16)
        products(*m, rows, static_cast<const Bfloat16*>(x), static_cast<Bfloat16*>(y), memory, threads);
    else
        products(*m, rows, static_cast<const float*>(x), static_cast<float*>(y), memory, threads);
}

// Cross entropy, and with z-loss, of logits x (rows, n) that become its gradient: sums (rows, 2). 1: a wrong target.
int entropy_rows(void* x, const int64_t* targets, int64_t rows, int64_t n, double z_loss, int64_t gradient,
                 double* sums, int64_t threads, int64_t bfloat16) {
    if (bfloat16) return entropies(static_cast<Bfloat16*>(x), targets, rows, n, z_loss, gradient, sums, threads);
    return entropies(static_cast<float*>(x), targets, rows, n, z_loss, gradient, sums, threads);
}

// Cross entropy, divergence from a teacher's logits, and their weighted sum, in the same way: sums (rows, 3).
int divergence_rows(void* x, const void* teacher, const int64_t* targets, int64_t rows, int64_t n, double ce, double kl,
                    int64_t gradient, double* sums, int64_t threads, int64_t bfloat16) {
    const auto of = [=](auto* logits) {
        const auto* theirs = static_cast<decltype(logits)>(const_cast<void*>(teacher));
        return divergences(logits, theirs, targets, rows, n, ce, kl, gradient, sums, threads);
    };
    return bfloat16 ? of(static_cast<Bfloat16*>(x)) : of(static_cast<float*>(x));
}

// y (rows, n) = silu(gate) * up of x = gate | up (rows, 2 n); of a gradient dy, y (rows, 2 n) is that by x.
void swiglu(const void* x, const void* dy, void* y, int64_t rows, int64_t n, int64_t threads, int64_t bfloat16) {
    (bfloat16 ? swiglus<Bfloat16> : swiglus<float>)(x, dy, y, rows, n, threads);
}

void turn(const Turn* t, const void* x, void* y, int64_t threads, int64_t bfloat16) {
    (bfloat16 ? turns<Bfloat16> : turns<float>)(*t, x, y, threads);
}
}
