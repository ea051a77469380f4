// A token of a few sequences through a block of linear attention.
//
// A block is six barriers, and no thread waits for what it can compute again in less time.

#pragma once

#include <utility>

#include "native_rows.h"

namespace {

struct Block {  // of linear attention
    int64_t dim, hidden;                           // of the residual stream, of the feed-forward part
    int64_t heads, kv_heads, k_dim, v_dim;         // of queries, of keys and values; dimensions as they are projected
    int64_t map_rows, features;                    // of a head
    int64_t map_layout, map_activation;            // 0 full, 1 per head, 2 none; relu, elu, softmax, exp, identity
    int64_t norms_at, norms_per_head;              // of queries and keys: 0 nowhere, 1 projection, 2 features
    int64_t rotary_at, rotary_pairs, interleaved;  // 0 nowhere, 1 projection, 2 features
    int64_t normaliser;                            // 0 none, 1 by mean square, 2 by mean and variance, 3 the sum
    int64_t ffn;                                   // 0 none, 1 silu, 2 gelu by tanh, 3 gelu by erf
    double normaliser_eps, sum_least, key_scale, exp_limit, rotary_magnitude;
    const float* decay;  // (heads,) or null
    Norm before_attention, after_attention, before_ffn, after_ffn, q_norm, k_norm;
    Matrix in_proj, q_map, k_map, gate, out_proj, ffn_gate, ffn_up, ffn_down;
};

struct Layer {  // what a call has for a block
    const Block* block;
    const float* frequencies;  // (pairs,)
    const float *S, *Z;        // (rows, heads, features, v_dim) and (rows, heads, features, 1); null at the beginning
    float *next_S, *next_Z;
};

struct Call {
    int64_t rows, threads, dim, layers;
    const Layer* layer;
    const int64_t* positions;  // (rows,), or one where `position_stride` is 0
    int64_t position_stride;
    int64_t* next_positions;  // (rows,), or one, or null
    // Either the residual stream, before and after the blocks, (rows, dim) in the model's dtype ...
    const void* x;
    void* y;
    int64_t bfloat16;
    // ... or tokens (rows,) and the logits (rows, out of `head`) behind them.
    const int64_t* ids;
    float* logits;
    Matrix embedding, head;
    double embedding_scale;
    Norm after_embedding, before_head;
    float* memory;
};

void softmax(const float* x, float sign, float* y, long n) {
    float most = sign * x[0], sum = 0;
    for (long i = 1; i < n; i++) most = std::max(most, sign * x[i]);
    for (long i = 0; i < n; i++) sum += y[i] = std::exp(sign * x[i] - most);
    for (long i = 0; i < n; i++) y[i] /= sum;
}

// Features of z (rows,), which may lie in the same place but for softmax, whose features are twice as many.
void activate(long activation, const float* z, float* y, long rows, float limit) {
    if (activation == 2) {
        softmax(z, 1, y, rows);
        softmax(z, -1, y + rows, rows);
        return;
    }
    for (long i = 0; i < rows; i++) {
        float x = z[i];
        if (activation == 0) x = x > 0 || x != x ? x : 0;
        if (activation == 1) x = x > 0 ? x + 1 : std::exp(x);
        if (activation == 3) x = std::exp(x > limit ? limit : x);
        y[i] = x;
    }
}

float through(long ffn, float x) {
    if (ffn == 1) return x / (1 + std::exp(-x));
    if (ffn == 2) return 0.5f * x * (1 + std::tanh(0.7978845608028654f * (x + 0.044715f * x * x * x)));
    return 0.5f * x * (1 + std::erf(x * 0.7071067811865476f));
}

// S' = decay S + k v^T and out = q S', of one head.
void renew(float decay, const float* S, const float* k, const float* q, const float* v, float* next, float* out, long K,
           long V) {
    std::fill(out, out + V, 0.0f);
    for (long i = 0; i < K; i++) {
        const float key = k[i], query = q[i];
        float* row = next + i * V;
        if (S)
            for (long j = 0; j < V; j++) row[j] = decay * S[i * V + j] + key * v[j];
        else
            for (long j = 0; j < V; j++) row[j] = key * v[j];
        for (long j = 0; j < V; j++) out[j] += query * row[j];
    }
}

// Floats of one row of each thing that lies in a call's memory: first what the threads share, then a part a thread.
struct Layout {
    long projected, queries, keys, wide, copy;
    Layout(const Block& b)
        : projected(b.in_proj.out), queries(b.heads * b.features), keys(b.kv_heads * b.features),
          wide(std::max({b.heads * b.v_dim, b.hidden, b.dim})), copy(std::max(b.dim, projected)) {}
    long shared() const { return projected + queries + keys + 3 * wide; }
    long own(const Block& b) const { return b.dim + copy + queries + keys + 2 * b.rotary_pairs; }
    static long of_a_head(const Block& b) { return 2 * b.features; }
    long size(const Block& b, long rows, long threads) const {
        return rows * shared() + threads * (rows * own(b) + of_a_head(b));
    }
};

class Step {
public:
    // x and y (rows, dim): the residual stream before and after the block; memory: `Layout::size` floats.
    Step(const Call& c, const Layer& layer, const float* x, float* y, float* memory, Share share)
        : b(*layer.block), c(c), layer(layer), x(x), y(y), at(b), share(share), rows(c.rows) {
        float* p = memory;
        const auto take = [&p](long n) { return std::exchange(p, p + n); };
        projected = take(rows * at.projected), queries = take(rows * at.queries), keys = take(rows * at.keys);
        mixed = take(rows * at.wide), given = take(rows * at.wide), upper = take(rows * at.wide);
        p += share.index * (rows * at.own(b) + at.of_a_head(b));
        normed = take(rows * b.dim), copy = take(rows * at.copy);
        my_queries = take(rows * at.queries), my_keys = take(rows * at.keys);
        cos_sin = take(rows * 2 * b.rotary_pairs), head = take(at.of_a_head(b));
    }

    void run() {
        if (b.rotary_at) angles();
        read();
        for (long r = 0; r < rows; r++) normalise(b.before_attention, copy + r * b.dim, normed + r * b.dim, b.dim);
        part(b.in_proj, normed, b.dim, projected, at.projected);
#pragma omp barrier
        features();
#pragma omp barrier
        mix();
#pragma omp barrier
        part(b.out_proj, mixed, at.wide, given, at.wide);
#pragma omp barrier
        read();
        add(b.after_attention);
        if (b.ffn != 0) {
            for (long r = 0; r < rows; r++) normalise(b.before_ffn, copy + r * b.dim, normed + r * b.dim, b.dim);
            feed();
#pragma omp barrier
            part(b.ffn_down, mixed, at.wide, given, at.wide);
#pragma omp barrier
            add(b.after_ffn);
        }
        for (long r = 0; r < rows; r++)
            for (long i = share.begin(b.dim); i < share.end(b.dim); i++) y[r * b.dim + i] = copy[r * b.dim + i];
    }

private:
    const Block& b;
    const Call& c;
    const Layer& layer;
    const float* x;
    float* y;
    const Layout at;
    const Share share;
    const long rows;
    float *projected, *queries, *keys;  // q | k | v of each row, and the features of its heads
    float *mixed, *given, *upper;       // what goes into a part's last matrix, what comes out; gates and ups
    float *normed, *copy;               // this thread's: what a part reads; the stream, or queries and keys
    float *my_queries, *my_keys, *cos_sin, *head;

    // This thread's share of a product.
    void part(const Matrix& m, const float* in, long in_stride, float* out, long out_stride) {
        const long first = share.begin(m.out);
        product(m, first, share.size(m.out), in, in_stride, out + first, out_stride, rows);
    }

    // Each thread has the whole stream for itself: to compute it again takes less than to wait for it.
    void read() { std::copy(x, x + rows * b.dim, copy); }

    // The stream and what a part has given.
    void add(const Norm& norm) {
        for (long r = 0; r < rows; r++) {
            float* row = copy + r * b.dim;
            normalise(norm, given + r * at.wide, normed + r * b.dim, b.dim);
            for (long i = 0; i < b.dim; i++) row[i] += normed[r * b.dim + i];
        }
    }

    void angles() {
        for (long r = 0; r < rows; r++)
            for (long i = 0; i < b.rotary_pairs; i++) {
                const float angle = float(c.positions[r * c.position_stride]) * layer.frequencies[i];
                float* row = cos_sin + 2 * r * b.rotary_pairs;
                row[i] = std::cos(angle) * float(b.rotary_magnitude);
                row[i + b.rotary_pairs] = std::sin(angle) * float(b.rotary_magnitude);
            }
    }

    void turned(float* x, long row) const {
        const float* cos = cos_sin + 2 * row * b.rotary_pairs;
        (b.interleaved ? turned_pairs<float, true> : turned_pairs<float, false>)(x, x, cos, cos + b.rotary_pairs, 1,
                                                                                 b.rotary_pairs);
    }

    void heads_normed(const Norm& norm, float* x, long heads) const {
        if (!b.norms_per_head) return normalise(norm, x, x, heads * b.k_dim);
        for (long h = 0; h < heads; h++) normalise(norm, x + h * b.k_dim, x + h * b.k_dim, b.k_dim);
    }

    void features() {
        const long Q = b.heads * b.k_dim, K = b.kv_heads * b.k_dim;
        float *q = copy, *k = copy + rows * Q;  // all queries, then all keys
        for (long r = 0; r < rows; r++) {
            std::copy_n(projected + r * at.projected, Q, q + r * Q);
            std::copy_n(projected + r * at.projected + Q, K, k + r * K);
            if (b.norms_at == 1) {
                heads_normed(b.q_norm, q + r * Q, b.heads);
                heads_normed(b.k_norm, k + r * K, b.kv_heads);
            }
            for (long h = 0; b.rotary_at == 1 && h < b.heads; h++) turned(q + r * Q + h * b.k_dim, r);
            for (long h = 0; b.rotary_at == 1 && h < b.kv_heads; h++) turned(k + r * K + h * b.k_dim, r);
        }
        if (b.q_map.w && b.q_map.w == b.k_map.w) {  // one map, with as many heads of both: its rows are read once
            map(b.q_map, b.heads, q, Q, my_queries, at.queries, 2 * rows);
        } else {
            map(b.q_map, b.heads, q, Q, my_queries, at.queries, rows);
            map(b.k_map, b.kv_heads, k, K, my_keys, at.keys, rows);
        }
        for (long r = 0; r < rows; r++) {
            activated(b.heads, my_queries + r * at.queries, queries + r * at.queries);
            activated(b.kv_heads, my_keys + r * at.keys, keys + r * at.keys);
        }
    }

    // W x + b of this thread's share of the heads, from `inputs` rows of all of them.
    void map(const Matrix& m, long heads, const float* in, long in_stride, float* out, long out_stride, long inputs) {
        const long R = b.map_rows, first = share.begin(heads), count = share.size(heads);
        if (b.map_layout == 0) return product(m, first * R, count * R, in, in_stride, out, out_stride, inputs);
        for (long h = 0; h < count; h++) {
            const float* own = in + (first + h) * b.k_dim;
            if (b.map_layout == 1)
                product(m, (first + h) * R, R, own, in_stride, out + h * R, out_stride, inputs);
            else
                for (long r = 0; r < inputs; r++) std::copy_n(own + r * in_stride, R, out + r * out_stride + h * R);
        }
    }

    void activated(long heads, const float* mapped, float* out) const {
        for (long h = share.begin(heads), i = 0; h < share.end(heads); h++, i++)
            activate(b.map_activation, mapped + i * b.map_rows, out + h * b.features, b.map_rows, float(b.exp_limit));
    }

    // Features normed over all heads, without gain and bias: these are one a query head, also for the keys.
    void normed_features(const Norm& norm, const float* from, float* to, long n) const {
        const Norm plain = {norm.kind, nullptr, nullptr, norm.eps};
        for (long r = 0; r < rows; r++) normalise(plain, from + r * n, to + r * n, n);
    }

    void gain(const Norm& norm, long h, float* x) const {
        for (long i = 0, j = h * b.features; i < b.features; i++, j++) {
            if (norm.gain) x[i] *= norm.gain[j];
            if (norm.bias) x[i] += norm.bias[j];
        }
    }

    void mix() {
        const float *all_queries = queries, *all_keys = keys;
        if (b.norms_at == 2) {
            normed_features(b.q_norm, queries, my_queries, at.queries);
            normed_features(b.k_norm, keys, my_keys, at.keys);
            all_queries = my_queries, all_keys = my_keys;
        }
        const long group = b.heads / b.kv_heads, F = b.features, V = b.v_dim;
        const long values = (b.heads + b.kv_heads) * b.k_dim;
        float *q = head, *k = q + F;
        for (long h = share.begin(b.heads); h < share.end(b.heads); h++)
            for (long r = 0; r < rows; r++) {
                std::memcpy(q, all_queries + r * at.queries + h * F, F * sizeof *q);
                std::memcpy(k, all_keys + r * at.keys + h / group * F, F * sizeof *k);
                if (b.norms_at == 2) gain(b.q_norm, h, q), gain(b.k_norm, h, k);
                for (long i = 0; i < F; i++) k[i] *= float(b.key_scale);
                float* out = mixed + r * at.wide + h * V;
                one_head(r, h, q, k, projected + r * at.projected + values + h / group * V, out);
            }
        if (b.gate.w) gated();
    }

    void gated() {
        const long first = share.begin(b.heads) * b.v_dim, count = share.size(b.heads) * b.v_dim;
        product(b.gate, first, count, normed, b.dim, upper + first, at.wide, rows);
        for (long r = 0; r < rows; r++)
            for (long i = first; i < first + count; i++)
                mixed[r * at.wide + i] *= 2 / (1 + std::exp(-upper[r * at.wide + i]));
    }

    void one_head(long row, long h, float* q, float* k, const float* v, float* out) const {
        const long F = b.features, V = b.v_dim, cell = row * b.heads + h;
        const float decay = b.decay ? b.decay[h] : 1.0f, one = 1.0f;
        float weights = 1.0f;
        if (b.normaliser == 3)  // their sum is that of unturned features
            renew(decay, layer.Z ? layer.Z + cell * F : nullptr, k, q, &one, layer.next_Z + cell * F, &weights, F, 1);
        if (b.rotary_at == 2) turned(q, row), turned(k, row);
        renew(decay, layer.S ? layer.S + cell * F * V : nullptr, k, q, v, layer.next_S + cell * F * V, out, F, V);
        if (b.normaliser == 3)
            for (long j = 0; j < V; j++) out[j] /= std::max(weights, float(b.sum_least));
        else
            normalise({b.normaliser, nullptr, nullptr, b.normaliser_eps}, out, out, V);
    }

    void feed() {
        const long first = share.begin(b.hidden), count = share.size(b.hidden);
        float *gates = mixed + first, *ups = upper + first;  // of every row, `wide` apart
        product(b.ffn_gate, first, count, normed, b.dim, gates, at.wide, rows);
        for (long r = 0; r < rows; r++)
            for (long i = 0; i < count; i++) gates[r * at.wide + i] = through(b.ffn, gates[r * at.wide + i]);
        if (!b.ffn_up.w) return;
        product(b.ffn_up, first, count, normed, b.dim, ups, at.wide, rows);
        for (long r = 0; r < rows; r++)
            for (long i = 0; i < count; i++) gates[r * at.wide + i] *= ups[r * at.wide + i];
    }
};

}  // namespace
